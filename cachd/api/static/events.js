// The events of the daemon, if it has the route: server-sent, resumed after the last one that was seen.

import { send } from "/assets/api.js";
import { bytes, byId, clock, duration, element } from "/assets/text.js";

const PATH = "/v1/events";
const MAX_SHOWN = 100;
const MAX_BUFFERED = 1 << 20;
const AGAIN_MS = 5_000;
const SLOWEST_MS = 60_000;
const HIDDEN = new Set(["id", "time", "kind", "model", "manifest"]);

export class Events {
  #heard;
  #last = "";
  #stream = null; // the AbortController of the request that runs
  #timer = 0;
  #isAbsent = false;
  #failures = 0;

  // `heard()` is called at each event.
  constructor(heard) {
    this.#heard = heard;
  }

  // Begin to follow, unless that runs already or the daemon has no such route.
  start() {
    clearTimeout(this.#timer);
    if (this.#stream || this.#isAbsent) return;
    this.#stream = new AbortController();
    this.#follow(this.#stream);
  }

  // Stop until `start` is called again.
  stop() {
    clearTimeout(this.#timer);
    this.#stream?.abort();
    this.#stream = null;
  }

  async #follow(stream) {
    try {
      const headers = { Accept: "text/event-stream" };
      if (this.#last) headers["Last-Event-ID"] = this.#last;
      const answer = await send(PATH, { headers, signal: stream.signal });
      byId("events-section").hidden = false;
      this.#failures = 0;
      for await (const message of messages(answer.body)) this.#take(message);
    } catch (error) {
      this.#isAbsent ||= error.status === 404;
      this.#failures += 1;
    }
    if (this.#stream !== stream) return; // it was stopped
    this.#stream = null;
    const pause = Math.min(AGAIN_MS * 2 ** this.#failures, SLOWEST_MS);
    if (!this.#isAbsent) this.#timer = setTimeout(() => this.start(), pause);
  }

  #take({ id, event, data }) {
    if (id) this.#last = id;
    if (!data || event === "end") return;
    try {
      show(event === "gap" ? { kind: "gap", detail: "Events before this one may be missing." } : JSON.parse(data));
    } catch {
      return; // it is no JSON
    }
    this.#heard();
  }
}

function show(event) {
  const line = element("li");
  const time = element("time", event.time ? clock(event.time) : "");
  if (typeof event.time === "string") time.dateTime = event.time;
  const facts = Object.entries(event).filter(([key, value]) => !HIDDEN.has(key) && value !== null);
  const said = [event.model, ...facts.map(([key, value]) => fact(key, value))].filter(Boolean);
  const kind = String(event.kind).replaceAll("_", " ");
  line.append(time, element("span", kind, "text"), element("span", said.join(" · "), "text"));
  const list = byId("events");
  list.prepend(line);
  while (list.children.length > MAX_SHOWN) list.lastElementChild.remove();
}

function fact(key, value) {
  if (key === "detail") return String(value);
  if (key === "seconds") return `took ${duration(value)}`;
  if (key.endsWith("_bytes")) return `${bytes(value)} ${key === "size_bytes" ? "" : key.slice(0, -6)}`.trim();
  return `${key}: ${typeof value === "object" ? JSON.stringify(value) : value}`;
}

// The messages of a stream (WHATWG HTML, section 9.2.6), as far as the daemon uses them.
async function* messages(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done || rest.length > MAX_BUFFERED) return;
    const blocks = (rest + value).split(/\r?\n\r?\n/);
    rest = blocks.pop();
    for (const block of blocks) {
      const fields = block.split(/\r?\n/).map((line) => line.match(/^(id|event|data): ?(.*)$/)).filter(Boolean);
      const all = (name) => fields.filter((field) => field[1] === name).map((field) => field[2]);
      yield { id: all("id").at(-1), event: all("event").at(-1), data: all("data").join("\n") };
    }
  }
}
