// The list of models: one row for each, which is kept and changed as long as the model is there.

import { bytes, byId, clock, duration, setText } from "/assets/text.js";

export const MAX_ROWS = 200;
const MAX_FINDINGS = 5; // of one model
const MOVING = new Set(["queued", "resolving", "waiting", "downloading", "publishing"]);
const WRONG = new Set(["failed", "damaged", "refused", "cancelled"]);
const WAITS = {
  slot: "other pulls run, and it waits for its turn",
  origin: "its source failed, and is asked again",
  slow: "its source hardly sends",
  space: "another process took the disk space that it waits for",
};

export const isMoving = (model) => Boolean(model.pull && MOVING.has(model.pull.state));
const isWrong = (model) => WRONG.has(model.state) || Boolean(model.pull?.error);

export class ModelList {
  #rows = new Map(); // name -> {item, at, model}
  #act;
  #models = [];

  // `act(action, model)` is called when a button of a row is pressed.
  constructor(act) {
    this.#act = act;
    byId("filter").addEventListener("input", () => this.#show());
  }

  // Shows these models, and returns a sentence for each whose state changed.
  update(models) {
    const before = new Map(this.#models.map((model) => [model.name, model.state]));
    this.#models = models;
    this.#show();
    return models
      .filter((model) => before.has(model.name) && before.get(model.name) !== model.state)
      .map((model) => `${model.name} is ${model.state}.`);
  }

  #show() {
    const wanted = byId("filter").value.trim().toLowerCase();
    const matching = this.#models.filter((model) => matches(model, wanted)).sort(inOrder);
    const shown = matching.slice(0, MAX_ROWS);
    const focused = document.activeElement;
    const names = new Set(shown.map((model) => model.name));
    for (const [name, row] of this.#rows) {
      if (!names.has(name)) {
        row.item.remove();
        this.#rows.delete(name);
      }
    }
    const list = byId("models");
    shown.forEach((model, index) => {
      const row = this.#row(model);
      if (list.children[index] !== row.item) list.insertBefore(row.item, list.children[index] ?? null);
      fill(row.at, model);
    });
    if (focused instanceof HTMLElement && focused.isConnected) focused.focus({ preventScroll: true });
    byId("none").hidden = matching.length > 0;
    setText(byId("none"), this.#models.length ? "No model matches the filter." : "No model is here yet.");
    byId("more").hidden = matching.length <= MAX_ROWS;
    setText(byId("more"), `${matching.length - MAX_ROWS} more models match. The filter takes a part of a name, ref or state.`);
    setText(byId("counts"), counts(this.#models));
  }

  #row(model) {
    let row = this.#rows.get(model.name);
    if (!row) {
      const item = byId("model").content.firstElementChild.cloneNode(true);
      const at = Object.fromEntries([...item.querySelectorAll("[data-at]")].map((each) => [each.dataset.at, each]));
      row = { item, at, model };
      item.dataset.name = model.name;
      for (const action of ["pin", "rollback", "again", "delete"]) {
        at[action].addEventListener("click", () => this.#act(action, row.model));
      }
      at.bar.setAttribute("aria-label", `Progress of ${model.name}`);
      this.#rows.set(model.name, row);
    }
    row.model = model;
    return row;
  }
}

function matches(model, wanted) {
  const texts = [model.name, model.ref, model.state, model.pull?.ref, model.pull?.state];
  return !wanted || texts.some((text) => text?.toLowerCase().includes(wanted));
}

// What is under way comes first, then what is wrong, then the rest by name.
function inOrder(one, other) {
  const rank = (model) => (isMoving(model) ? 0 : isWrong(model) ? 1 : 2);
  return rank(one) - rank(other) || (one.name < other.name ? -1 : 1);
}

function counts(models) {
  const found = new Map();
  for (const { state } of models) found.set(state, (found.get(state) ?? 0) + 1);
  return [...found].sort().map(([state, count]) => `${count} ${state}`).join(", ");
}

function fill(at, model) {
  const { pull, ready } = model;
  setText(at.name, model.name);
  setText(at.state, model.state);
  at.state.className = `state ${model.state}`;
  at.pinned.hidden = !model.pinned;
  setText(at.ref, `${ready?.ref ?? model.ref}${ready?.revision ? ` · revision ${ready.revision.slice(0, 12)}` : ""}`);
  const size = ready?.bytes ?? pull?.bytes.total;
  setText(at.size, size ? `${bytes(size)}${unverified(model)}` : "not known yet");
  setText(at.resident, ready ? `${bytes(model.resident_bytes)}${percent(model.resident_bytes, ready.bytes)}` : "–");
  setText(at.users, users(model));
  fillProgress(at, model);
  fillFindings(at, model);
  fillFailure(at, model);
  fillActions(at, model);
}

const unverified = (model) => (model.verified === false ? " (not verified)" : "");
const percent = (part, all) => (all && part ? ` (${Math.floor((100 * part) / all)} %)` : "");

function users(model) {
  const found = model.in_use ? [model.in_use_by ?? "open files"] : [];
  for (const { holder, expires_at } of model.leases) found.push(`${holder || "a lease"} until ${clock(expires_at)}`);
  if (found.length) return found.join(", ");
  return model.last_opened ? `nobody since ${clock(model.last_opened)}` : "nobody";
}

function fillProgress(at, model) {
  const { pull } = model;
  at.moving.hidden = !isMoving(model);
  if (at.moving.hidden) return;
  const { done, total } = pull.bytes;
  if (total) {
    at.bar.max = total;
    at.bar.value = done;
  } else {
    at.bar.removeAttribute("value"); // its size is not known yet
  }
  const texts = [pull.state === model.state ? "" : `${pull.state}: ${pull.ref}`];
  if (total) texts.push(`${bytes(done)} of ${bytes(total)} (${Math.floor((100 * done) / total)} %)`);
  if (pull.files.total) texts.push(`${pull.files.done} of ${pull.files.total} files`);
  if (pull.rate_bytes_per_second) texts.push(`${bytes(pull.rate_bytes_per_second)}/s`);
  if (pull.eta_seconds !== null) texts.push(`${duration(pull.eta_seconds)} left`);
  if (pull.waits) texts.push(waits(pull.waits));
  if (pull.paused) texts.push("paused");
  setText(at.progress, texts.filter(Boolean).join(" · "));
}

function waits({ reason, until, detail }) {
  const end = until ? ` until ${clock(until)}` : "";
  return `${WAITS[reason] ?? reason}${end}${detail ? `: ${detail}` : ""}`;
}

// What engines would find wrong with a ready model. The first ones say enough; `cachd show` has all.
function fillFindings(at, model) {
  const found = model.ready?.preflight ?? [];
  at.findings.hidden = found.length === 0;
  const texts = found.slice(0, MAX_FINDINGS).map(
    ({ level, file, detail, code, hint }) => `${level}: ${file ? `${file}: ` : ""}${detail} (${code})${hint ? `. ${hint}` : ""}`,
  );
  if (found.length > MAX_FINDINGS) texts.push(`${found.length - MAX_FINDINGS} more findings`);
  while (at.findings.children.length > texts.length) at.findings.lastElementChild.remove();
  while (at.findings.children.length < texts.length) at.findings.append(document.createElement("li"));
  texts.forEach((text, index) => setText(at.findings.children[index], text));
}

function fillFailure(at, model) {
  const error = isMoving(model) ? null : (model.pull?.error ?? null);
  at.failure.hidden = !error && !model.damage;
  if (at.failure.hidden) return;
  const isOfNew = model.state === "ready" && error;
  const reason = error ? error.detail : `damaged since ${clock(model.damage.since)}: ${model.damage.reason}`;
  setText(at.reason, `${isOfNew ? `The pull of ${model.pull.ref} failed: ` : ""}${reason}`);
  setText(at.hint, error?.hint ?? "");
  at.hint.hidden = !error?.hint;
  const end = model.final ? "the same pull would fail again" : "the same pull may succeed later";
  setText(at.code, error ? `code: ${error.code} · ${end}` : "cachd repairs it from its source");
}

function fillActions(at, model) {
  setText(at.pin, model.pinned ? "Unpin" : "Pin");
  at.rollback.hidden = model.previous.length === 0;
  at.again.hidden = isMoving(model) || !isWrong(model) || !model.pull;
  const labels = { pin: at.pin.textContent, rollback: "Roll back", again: "Pull again", delete: "Delete" };
  for (const [action, label] of Object.entries(labels)) at[action].setAttribute("aria-label", `${label} ${model.name}`);
}
