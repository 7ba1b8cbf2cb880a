// The events of the daemon, if it has the route: server-sent, resumed after the last one that was seen.

import { send } from "/assets/api.js";
import { byId, clock, element } from "/assets/text.js";

const PATH = "/v1/events";
const MAX_SHOWN = 100;
const MAX_BUFFERED = 1 << 20;
const AGAIN_MS = 5_000;
const SLOWEST_MS = 60_000;
const PLAIN = new Set(["id", "time", "kind", "model"]);

export class Events {
  #last = "";
  #stream = null; // the AbortController of the request that runs
  #timer = 0;
  #isAbsent = false;
  #failures = 0;

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
      for await (const event of messages(answer.body)) this.#add(event);
    } catch (error) {
      this.#isAbsent ||= error.status === 404;
      this.#failures += 1;
    }
    if (this.#stream !== stream) return; // it was stopped
    this.#stream = null;
    const pause = Math.min(AGAIN_MS * 2 ** this.#failures, SLOWEST_MS);
    if (!this.#isAbsent) this.#timer = setTimeout(() => this.start(), pause);
  }

  #add({ id, data }) {
    let event;
    try {
      event = JSON.parse(data);
    } catch {
      return;
    }
    if (id) this.#last = id;
    const line = element("li");
    const time = element("time", clock(event.time));
    if (typeof event.time === "string") time.dateTime = event.time;
    const facts = Object.entries(event).filter(([key, value]) => !PLAIN.has(key) && value !== null);
    const said = [event.model, ...facts.map(([key, value]) => `${key}: ${text(value)}`)].filter(Boolean);
    line.append(time, element("span", text(event.kind), "text"), element("span", said.join(" · "), "text"));
    const list = byId("events");
    list.prepend(line);
    while (list.children.length > MAX_SHOWN) list.lastElementChild.remove();
  }
}

const text = (value) => (typeof value === "object" ? JSON.stringify(value) : String(value ?? ""));

// The messages of a stream (WHATWG HTML, section 9.2.6), as far as the daemon uses them.
async function* messages(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done || rest.length > MAX_BUFFERED) return;
    const parts = (rest + value).split(/\r?\n\r?\n/);
    rest = parts.pop();
    for (const part of parts) {
      const fields = part.split(/\r?\n/).map((line) => line.match(/^(id|data): ?(.*)$/)).filter(Boolean);
      const of = (name) => fields.filter((field) => field[1] === name).map((field) => field[2]);
      if (of("data").length) yield { id: of("id").at(-1) ?? "", data: of("data").join("\n") };
    }
  }
}
