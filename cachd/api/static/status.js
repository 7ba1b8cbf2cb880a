// The status page: asks the daemon again and again while somebody sees the page, and does what buttons say.

import { Problem, ask, setToken } from "/assets/api.js";
import { Events } from "/assets/events.js";
import { ModelList, isMoving } from "/assets/models.js";
import { showDisk, showMemory } from "/assets/space.js";
import { byId, setText } from "/assets/text.js";

const PAGE = 500; // models in one answer
const MOVING_MS = 2_000;
const IDLE_MS = 10_000;
const SOON_MS = 1_000;
const SLOWEST_MS = 60_000;
const REST = 10; // after a listing, wait ten times as long as it took

const list = new ModelList(act);
const events = new Events(soon);
let timer = 0;
let nextAt = 0; // of the timer, on the clock of performance.now
let took = 0; // milliseconds, by the last listing
let failures = 0;
let isAsking = false;
let isOutdated = false; // this page changed something while the daemon was asked
let isStale = false; // something else happened on the node while it was asked

async function everyModel() {
  const models = [];
  let after = "";
  do {
    const page = await ask("GET", `/v1/models?${new URLSearchParams({ limit: PAGE, after })}`);
    models.push(...page.models);
    after = page.next ?? "";
  } while (after && !document.hidden);
  return models;
}

async function refresh() {
  clearTimeout(timer);
  if (document.hidden) return;
  if (isAsking) {
    isOutdated = true;
    return;
  }
  isAsking = true;
  isOutdated = isStale = false;
  let pause;
  try {
    pause = await askOnce();
    if (isStale) pause = Math.min(pause, soonest());
    failures = 0;
    byId("connection").hidden = true;
  } catch (error) {
    failures += 1;
    pause = Math.min(Math.max(1000 * (error.retryAfter ?? 0), IDLE_MS * 2 ** (failures - 1)), SLOWEST_MS);
    byId("connection").hidden = false;
    setText(byId("connection"), textOf(error));
  } finally {
    isAsking = false;
  }
  if (!document.hidden) schedule(isOutdated ? 0 : pause);
}

function schedule(pause) {
  clearTimeout(timer);
  nextAt = performance.now() + pause;
  timer = setTimeout(refresh, pause);
}

// Something happened on the node: ask sooner than the timer would.
function soon() {
  isStale = true;
  const canWait = nextAt - performance.now() > soonest();
  if (canWait && !isAsking && !failures && !document.hidden) schedule(soonest());
}

const soonest = () => Math.max(SOON_MS, REST * took);

// Asks for all that is shown. The answer is the time until the next time, in milliseconds.
async function askOnce() {
  const began = performance.now();
  const models = await everyModel();
  if (document.hidden) return IDLE_MS;
  const news = list.update(models);
  if (news.length) setText(byId("news"), news.join(" "));
  showMemory(models);
  showDisk(await ask("GET", "/v1/capacity"));
  took = performance.now() - began;
  return Math.max(models.some(isMoving) ? MOVING_MS : IDLE_MS, REST * took);
}

// --- what buttons do ---

const modelPath = (name, rest = "") => `/v1/models/${encodeURIComponent(name)}${rest}`;

function act(action, model) {
  const { name } = model;
  const actions = {
    pin: () =>
      model.pinned
        ? change("DELETE", modelPath(name, "/pin"), `${name} is not pinned any more.`)
        : change("PUT", modelPath(name, "/pin"), `${name} is pinned.`),
    again: () => change("POST", "/v1/models", `The pull of ${name} has begun.`, request(model.pull)),
    rollback: () => {
      const { ref, revision } = model.previous[0];
      confirm(`Roll back ${name}?`, `It then points to ${ref} at revision ${revision}.`, "Roll back", () =>
        change("POST", modelPath(name, "/rollback"), `${name} points to its previous snapshot.`),
      );
    },
    delete: () =>
      confirm(`Delete ${name}?`, "Its pull is cancelled, and its bytes are freed.", "Delete", () =>
        change("DELETE", modelPath(name), `${name} is deleted.`),
      ),
  };
  actions[action]();
}

// What asks for the same files again.
function request({ ref, name, include, exclude, hub_id, weights }) {
  return { ref, name, include, exclude, ...(hub_id && { hub_id }), ...(weights && { weights }) };
}

async function change(method, path, said, body) {
  try {
    await ask(method, path, body);
    say(said, false);
    refresh();
    return true;
  } catch (error) {
    say(textOf(error), true);
    if (error.status === 401) byId("token").focus();
    return false;
  }
}

function say(text, isError) {
  byId("said").className = isError ? "said error" : "said";
  setText(byId("said"), text);
}

function textOf(error) {
  if (!(error instanceof Problem)) console.error(error);
  return error instanceof Problem ? error.text : String(error);
}

function confirm(title, text, label, agreed) {
  setText(byId("confirm-title"), title);
  setText(byId("confirm-text"), text);
  setText(byId("confirm-yes"), label);
  byId("confirm-yes").onclick = () => {
    byId("confirm").close();
    agreed();
  };
  byId("confirm").showModal();
}

byId("confirm-no").addEventListener("click", () => byId("confirm").close());

byId("pull").addEventListener("submit", async (event) => {
  event.preventDefault();
  const form = event.target;
  const button = form.querySelector("button");
  const ref = form.elements.ref.value.trim();
  const name = form.elements.name.value.trim();
  button.disabled = true;
  const body = { ref, ...(name && { name }), ...(form.elements.pin.checked && { pin: true }) };
  const isBegun = await change("POST", "/v1/models", `The pull of ${ref} has begun.`, body);
  button.disabled = false;
  if (isBegun) form.reset();
});

byId("token-form").addEventListener("submit", (event) => event.preventDefault());
byId("token").addEventListener("change", () => {
  setToken(byId("token").value);
  refresh();
  events.stop();
  events.start();
});

document.addEventListener("visibilitychange", () => {
  if (document.hidden) {
    clearTimeout(timer);
    events.stop();
  } else {
    refresh();
    events.start();
  }
});

document.title = `cachd on ${location.host}`;
setText(byId("node"), location.host);
setToken(byId("token").value); // some browsers fill it in again after a reload
refresh();
if (!document.hidden) events.start();
