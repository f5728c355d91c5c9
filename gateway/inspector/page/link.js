// The line to the gateway: JSON and the stream of changes. The admin token travels in a header and
// lives in this tab's sessionStorage; it never stands in an address.

const BASE = new URL("../v1/cachewise/", document.baseURI);
const KEY = "cachewise.admin-token";
const SILENCE_MS = 25_000;

export class Refused extends Error {}

export const token = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
  clear: () => sessionStorage.removeItem(KEY),
};

function ask(path, options = {}) {
  const value = token.get();
  const headers = value ? { authorization: `Bearer ${value}` } : {};
  return fetch(new URL(path, BASE), { headers, cache: "no-store", credentials: "omit", ...options });
}

export async function json(path) {
  const answer = await ask(path);
  if (answer.status === 401) throw new Refused();
  if (answer.status === 404) return null;
  if (!answer.ok) throw new Error(`${answer.status}`);
  return answer.json();
}

/**
 * Follow the stream for as long as it lasts: `on.hello`, `on.frame` with each event's data. Throws
 * `Refused` without a valid token, and when the stream ends or falls silent.
 */
export async function follow(on) {
  const stop = new AbortController();
  let alarm = setTimeout(() => stop.abort(), SILENCE_MS);
  try {
    const answer = await ask("events", { signal: stop.signal });
    if (answer.status === 401) throw new Refused();
    if (!answer.ok) {
      const body = await answer.json().catch(() => null);
      throw new Error(body?.error?.message ?? `the gateway answered ${answer.status}`);
    }
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new Error("the gateway closed the line");
      clearTimeout(alarm);
      alarm = setTimeout(() => stop.abort(), SILENCE_MS);
      rest += value;
      const events = rest.split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const [name, data] = event.split("\n", 2);
        on[name.slice("event: ".length)]?.(JSON.parse(data.slice("data: ".length)));
      }
    }
  } finally {
    clearTimeout(alarm);
    stop.abort();
  }
}
