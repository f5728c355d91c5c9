// The pods: whose KV fills them, what admission allows, how they fare.

import { attr, count, h, percent, say, span, whole } from "./dom.js";
import { STATE_NAMES } from "./store.js";

const KINDS = ["running", "held", "tool", "human", "background", "idle", "ended"];
const STATUS = {
  ready: "ready",
  draining: "draining",
  withheld: "withheld",
  lost: "lost",
  new: "not ready yet",
};
const MANY = 8;

export class Pods {
  constructor(root, on) {
    this.root = root;
    this.on = on;
    this.cards = new Map();
  }

  show(pods) {
    this.root.classList.toggle("many", pods.size > MANY);
    for (const [name, card] of this.cards) {
      if (!pods.has(name)) {
        card.root.remove();
        this.cards.delete(name);
      }
    }
    const names = [...pods.keys()].sort(new Intl.Collator("en", { numeric: true }).compare);
    for (const name of names) {
      const pod = pods.get(name);
      let card = this.cards.get(name);
      if (!card) {
        card = this.#make(name);
        this.cards.set(name, card);
        const next = names.slice(names.indexOf(name) + 1).find((one) => this.cards.has(one));
        this.root.insertBefore(card.root, next ? this.cards.get(next).root : null);
      }
      fill(card, pod);
    }
  }

  #make(name) {
    const c = {};
    const figure = (label, title) => {
      const value = h("dd");
      return [value, h("div", { title }, h("dt", {}, label), value)];
    };
    c.status = h("span", { class: "status" });
    c.flags = h("span", { class: "flags" });
    c.flight = h("span");
    c.queued = h("span", { class: "queued" });
    c.segments = Object.fromEntries([...KINDS, "other"].map((kind) => [kind, h("i", { class: kind })]));
    c.budget = h("b", { class: "budget", title: "Budget: what places may take" });
    c.bar = h("div", { class: "occupancy", role: "img" }, Object.values(c.segments), c.budget);
    c.free = h("span");
    c.split = h("span");
    c.lives = h("span", { class: "lives" });
    let places, reserve, regret, rate;
    [c.places, places] = figure("Places", "Tokens of admitted sessions, of the budget");
    [c.reserve, reserve] = figure("Reserve", "The budget's share of the capacity");
    [c.regret, regret] = figure("Regret", "Share of the tokens that admitted sessions left here and did not find again");
    [c.rate, rate] = figure("Prefill", "Tokens a second, learned from the turns served");
    c.placesBar = h("i");
    c.root = h(
      "article",
      { class: "pod", "data-pod": name },
      h(
        "header",
        {},
        h("button", { type: "button", class: "name", title: "Show only its sessions", onclick: () => this.on.filter(name) }, name),
        c.status,
        c.flags,
        h("span", { class: "flight" }, c.flight, c.queued),
      ),
      c.bar,
      h("p", {}, h("span", { class: "split" }, c.split, c.lives), c.free),
      h("dl", {}, places, reserve, regret, rate),
    );
    return c;
  }
}

function fill(c, pod) {
  attr(c.root, "data-status", pod.status);
  say(c.status, STATUS[pod.status] ?? pod.status);
  attr(c.status, "data-status", pod.status);
  const flags = [];
  flags.push(pod.hints ? "hints" : "no hints");
  if (pod.session_id === false) flags.push("no session ids");
  say(c.flags, flags.join(" · "));
  attr(c.flags, "title", [pod.embedded ? "an embedded pod: it generates no real text" : pod.version && `vLLM ${pod.version}`, ...(pod.warnings ?? [])].filter(Boolean).join("\n"));
  say(c.flight, `${pod.in_flight} in flight`);
  say(c.queued, pod.queued_tokens ? `, ${count(pod.queued_tokens)} queued` : "");
  const ground = pod.capacity ?? Math.max(1, pod.resident_tokens);
  const told = [];
  let known = 0;
  for (const kind of KINDS) {
    const tokens = pod.resident[kind] ?? 0;
    known += tokens;
    c.segments[kind].style.setProperty("width", `${(100 * tokens) / ground}%`);
    attr(c.segments[kind], "title", `${STATE_NAMES[kind]}: ${whole(tokens)} tokens`);
    if (tokens) told.push(`${STATE_NAMES[kind].toLowerCase()} ${percent(tokens / ground)}`);
  }
  const other = Math.max(0, pod.resident_tokens - known);
  c.segments.other.style.setProperty("width", `${(100 * other) / ground}%`);
  const free = pod.capacity === null ? null : Math.max(0, pod.capacity - pod.resident_tokens);
  if (free !== null) told.push(`free ${percent(free / ground)}`);
  attr(c.bar, "aria-label", `KV of ${pod.name}: ${told.join(", ")}`);
  c.budget.hidden = pod.budget === undefined;
  if (pod.budget !== undefined) {
    c.budget.style.setProperty("left", `${Math.min(100, (100 * pod.budget) / ground)}%`);
    attr(c.budget, "title", `Budget ${whole(pod.budget)} tokens: ${percent(pod.budget / ground)} of the cache`);
  }
  say(
    c.split,
    pod.capacity === null
      ? `${count(pod.resident_tokens)} tokens resident, capacity not told`
      : `${count(pod.resident_tokens)} of ${count(pod.capacity)} tokens`,
  );
  say(c.lives, ` · ${pod.sessions} sessions`);
  say(c.free, free === null ? "" : `${count(free)} free`);
  const placed = pod.place_tokens ?? 0;
  say(
    c.places,
    pod.places === undefined
      ? "–"
      : pod.budget === undefined
        ? `${pod.places}`
        : `${pod.places} · ${count(placed)} / ${count(pod.budget)}`,
  );
  c.places.classList.toggle("over", pod.budget !== undefined && placed > pod.budget);
  say(c.reserve, pod.reserve === undefined ? "–" : pod.reserve.toFixed(2));
  say(c.regret, pod.regret === undefined ? "–" : percent(pod.regret, 1));
  say(c.rate, `${count(pod.rate)}/s`);
  attr(c.places, "title", pod.horizon_s === undefined ? null : `A place is kept for a session expected back within about ${span(pod.horizon_s)}`);
}
