// Asks the daemon's API. The token is kept in a variable of this module: in no storage, no cookie and no URL.

const ANSWER_MS = 30_000;
let token = "";

export function setToken(text) {
  token = text.trim();
}

export class Problem extends Error {
  constructor(detail, { status = 0, code = "", hint = "", retryAfter = 0 } = {}) {
    super(detail);
    Object.assign(this, { status, code, hint, retryAfter });
  }

  // What happened, what to do about it, and the code: one line each.
  get text() {
    return [this.message, this.hint, this.code && `code: ${this.code}`].filter(Boolean).join("\n");
  }
}

// The answer of a call: its JSON, or null. Throws Problem.
export async function ask(method, path, body) {
  const headers = { Accept: "application/json" };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const content = body === undefined ? undefined : JSON.stringify(body);
  const answer = await send(path, { method, headers, body: content, signal: AbortSignal.timeout(ANSWER_MS) });
  if (answer.status === 204) return null;
  try {
    return await answer.json();
  } catch {
    throw new Problem("The daemon's answer ended early.");
  }
}

// A successful answer whose body is still to be read. Throws Problem.
export async function send(path, options) {
  const headers = new Headers(options.headers);
  let answer;
  try {
    if (token) headers.set("Authorization", `Bearer ${token}`);
  } catch {
    throw new Problem("The token has characters that no token has.", { code: "unauthorized" });
  }
  try {
    answer = await fetch(path, { ...options, headers, cache: "no-store", redirect: "error" });
  } catch {
    throw new Problem("The daemon does not answer.");
  }
  if (!answer.ok) throw await problemOf(answer);
  return answer;
}

async function problemOf(answer) {
  let said = {};
  try {
    said = await answer.json();
  } catch {
    // a proxy's page, say
  }
  return new Problem(String(said.detail ?? `The daemon answered ${answer.status}.`), {
    status: answer.status,
    code: String(said.code ?? ""),
    hint: String(said.hint ?? ""),
    retryAfter: Number(answer.headers.get("Retry-After")) || 0,
  });
}
