// One session: what it waits for and how long that may take, where its KV is, and each of its turns
// with the reasons of what was done.

import { attr, clock, count, h, percent, say, short, span, svg, whole } from "./dom.js";
import { json } from "./link.js";
import { clientName } from "./list.js";
import { STATE_NAMES, sinceOf } from "./store.js";

const REFRESH_MS = 1_000;
const AT_LEAST_MS = 4_000;

const ROUTED = {
  only: "the only pod that could take it",
  home: "its KV is there, and waiting for it costs less than computing it elsewhere",
  moved: "its KV is elsewhere, but waiting there would have cost more than computing the prompt here",
  shared_prefix: "another session has left the beginning of its prompt there",
  hashed: "no pod has any of its prompt, and of those not crowded its hash points here",
  admitted: "the first pod that had room for it",
  policy: "the routing policy chose it",
  fallback: "routing failed, so it took the pod with the fewest turns",
};
const HELD = {
  no_room: "no pod had room for it",
  after_a_due_turn: "another turn has waited longer than its due and goes first",
  no_pod: "no pod was ready",
};
const LOST = {
  first_turn: ["computed", "the session is new"],
  prefix_break: ["useless", "the prompt no longer begins as the last one did"],
  moved: ["left behind", "its KV is on another pod"],
  pod_restart: ["gone", "the pod was restarted and its cache is empty"],
  evicted: ["evicted", "the pod gave its blocks to others meanwhile"],
};
const BROKE = {
  model: "another model was asked for",
  tools: "the list of tools has changed",
  system: "the system prompt has changed",
  compaction: "the client replaced its history by a summary",
  edit: "a message in the middle has changed",
  truncation: "messages were left out",
};
const ENDED = {
  ok: "answered",
  pod_error: "the pod answered with an error",
  gateway_error: "refused by the gateway",
  broken_off: "the pod failed in the middle of its answer",
  client_gone: "the client left",
  cancelled: "cancelled",
  failed: "failed",
};
const NEXT = {
  tool: "now waits for",
  human: "now waits for a person",
  background: "now waits for what it left running",
  ended: "has ended",
};
export const COSTS = [
  ["queue_s", "queue", "behind what is queued there"],
  ["prefill_s", "prefill", "computing what is not cached"],
  ["crowd_s", "crowd", "sessions that live there"],
  ["hold_s", "hold", "until there is a place"],
];

export class Detail {
  constructor(root, store, on) {
    this.root = root;
    this.store = store;
    this.on = on;
    this.sid = null;
    this.open = new Set();
    this.asked = 0;
    this.pending = false;
    this.found = null;
    this.drawn = "";
    root.addEventListener("keydown", (event) => {
      if (event.key === "Escape") on.close();
    });
  }

  show(sid, turn = null) {
    if (sid !== this.sid) {
      this.sid = sid;
      this.open = new Set();
      this.found = null;
      this.drawn = "";
      this.seen = null;
      this.asked = 0;
      this.root.replaceChildren();
    }
    if (turn !== null) {
      this.open.add(turn);
      this.goTo = turn;
      this.drawn = "";
    }
    this.root.hidden = false;
    this.refresh(true);
  }

  close() {
    this.sid = null;
    this.root.hidden = true;
    this.root.replaceChildren();
  }

  /** Called as changes come: asks again where the session has changed, and now and then. */
  refresh(force = false) {
    if (this.sid === null) return;
    const row = this.store.sessions.get(this.sid);
    const version = row && JSON.stringify(row);
    const waited = performance.now() - this.asked;
    const due = force || (version !== this.seen && waited > REFRESH_MS) || waited > AT_LEAST_MS;
    if (due && !this.pending) {
      this.seen = version;
      this.#ask(this.sid);
    }
    this.#head();
  }

  async #ask(sid) {
    this.pending = true;
    this.asked = performance.now();
    try {
      const [session, turns] = await Promise.all([json(`sessions/${sid}`), json(`sessions/${sid}/turns`)]);
      if (sid !== this.sid) return;
      this.found = { session, turns: turns?.data ?? [] };
      this.#draw();
    } catch (error) {
      this.on.failed(error);
    } finally {
      this.pending = false;
    }
    if (sid !== this.sid) this.refresh(true);
  }

  #draw() {
    const { session, turns } = this.found;
    const print = JSON.stringify([session?.forecast?.expected_remaining_s, session?.resident_tokens, session?.place, turns, this.store.sessions.get(this.sid)]);
    if (print === this.drawn) return;
    const selection = getSelection();
    if (!selection.isCollapsed && this.root.contains(selection.anchorNode)) return; // being copied
    this.drawn = print;
    const focused = this.root.contains(document.activeElement) ? document.activeElement.dataset.key : null;
    const list = this.root.querySelector(".scroll");
    const top = list?.scrollTop ?? 0;
    this.root.replaceChildren(...this.#page(session, turns));
    const now = this.root.querySelector(".scroll");
    now.scrollTop = top;
    if (focused) this.root.querySelector(`[data-key="${CSS.escape(focused)}"]`)?.focus();
    if (this.goTo !== undefined && this.goTo !== null) {
      this.root.querySelector(`[data-key="turn-${this.goTo}"]`)?.scrollIntoView({ block: "nearest" });
      this.goTo = null;
    }
    this.#head();
  }

  #page(session, turns) {
    const sid = this.sid;
    this.headline = h("p", { class: "headline" });
    this.pill = h("span", { class: "pill" });
    const head = h(
      "header",
      {},
      h(
        "div",
        { class: "title" },
        h("h2", {}, session ? clientName(session.client) : "Forgotten session"),
        this.pill,
        h("button", { type: "button", class: "quiet icon", "data-key": "close", "aria-label": "Close", onclick: () => this.on.close() }, "✕"),
      ),
      h("p", { class: "ids" }, h("code", { title: sid }, sid)),
      session && this.#facts(session),
    );
    const body = h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Details" });
    body.append(h("section", {}, this.headline, session?.forecast ? chart(session) : ""));
    if (session) body.append(residency(session));
    body.append(this.#turns(turns, session));
    return [head, body];
  }

  #facts(session) {
    const facts = [];
    if (session.class !== "main") facts.push(session.class === "auxiliary" ? "aside" : session.class);
    facts.push(session.model, `tenant ${session.tenant}`, `known by ${session.identified_by.replaceAll("_", " ")}`);
    const links = [];
    const link = (sid, text) =>
      h("button", { type: "button", class: "link-button", "data-key": `to-${sid}`, onclick: () => this.on.choose(sid) }, `${text} ${short(sid)}`);
    if (session.parent) links.push(link(session.parent, "sub-agent of"));
    if (session.forked_from) links.push(link(session.forked_from, "forked from"));
    return h("p", { class: "facts" }, facts.join(" · "), links.length ? " · " : "", ...links);
  }

  #head() {
    if (!this.headline) return;
    const row = this.store.sessions.get(this.sid);
    if (!row) {
      say(this.headline, "The gateway has forgotten this session; its latest turns are below.");
      return;
    }
    attr(this.pill, "data-state", row.state);
    say(this.pill, STATE_NAMES[row.state] ?? row.state);
    say(this.headline, sentence(row, this.store.now(), this.found?.session?.forecast));
  }

  #turns(turns, session) {
    const longest = Math.max(1, ...turns.map(({ span: t }) => (t.s ?? this.store.now() - t.at)));
    const items = turns.map(({ span: turn, reasons }, index) => {
      const before = turns.slice(index + 1).find(({ span: one }) => one.s !== undefined && one.n < turn.n)?.span;
      return this.#turn(turn, reasons, before, longest);
    });
    const kept = session && session.turns > turns.length ? ` The latest ${turns.length} of ${session.turns}.` : "";
    return h(
      "section",
      {},
      h("h3", {}, "Turns"),
      turns.length
        ? h("ol", { class: "turn-list" }, items)
        : h("p", { class: "hint" }, "None is kept: the history holds the gateway's latest turns."),
      kept && h("p", { class: "hint" }, kept.trim()),
    );
  }

  #turn(turn, reasons, before, longest) {
    const open = this.open.has(turn.n);
    const seconds = turn.s ?? this.store.now() - turn.at;
    const held = turn.phase === "held" ? seconds : (turn.held ?? 0);
    const first = turn.first ?? (turn.phase === "decode" ? turn.since - turn.at : seconds);
    const part = (kind, from, to) =>
      to > from && h("i", { class: kind, vars: { left: `${(100 * from) / longest}%`, width: `max(2px, ${(100 * (to - from)) / longest}%)` } });
    const marks = [];
    if (turn.break) marks.push(h("i", { class: "mark break", title: `Prefix break: ${turn.break[0]}` }));
    if (lossesOf(turn).some(([cause]) => cause !== "first_turn" && cause !== "prefix_break")) {
      marks.push(h("i", { class: "mark lost", title: "KV lost" }));
    }
    const failed = turn.end !== undefined && turn.end !== "ok";
    const ratio = turn.kv && turn.kv[1] !== null ? percent(turn.kv[1] / Math.max(1, turn.kv[0])) : "";
    const id = `turn-${turn.n}`;
    const button = h(
      "button",
      {
        type: "button",
        class: "turn",
        "data-key": id,
        "aria-expanded": String(open),
        "aria-controls": `${id}-why`,
        onclick: () => {
          if (!this.open.delete(turn.n)) this.open.add(turn.n);
          this.drawn = "";
          this.#draw();
        },
      },
      h("span", { class: "number" }, `${turn.n}`),
      h("span", { class: "clock" }, clock(turn.at)),
      h(
        "span",
        { class: "extent" },
        part("held", 0, held),
        failed ? part("failed", held, seconds) : part("prefill", held, first),
        !failed && part("running", first, seconds),
      ),
      h("span", { class: "took" }, span(seconds)),
      h("span", { class: "cached" }, ratio),
      h("span", { class: "marks" }, marks),
    );
    return h("li", { class: open ? "open" : "" }, button, open && explanation(turn, reasons, before, id, seconds));
  }
}

const PHASES = { arriving: "has been arriving", prefill: "has been in prefill", decode: "has been answering" };

function runningSentence(row, now) {
  const turn = row.now?.[0];
  if (!turn) return "A turn is running.";
  const where = turn.pod && turn.phase !== "arriving" ? ` on ${turn.pod}` : "";
  const held = turn.held ? `, after it was held for ${span(turn.held)}` : "";
  const more = row.now.length > 1 ? ` ${row.now.length - 1} more run beside it.` : "";
  return `Turn ${turn.n} ${PHASES[turn.phase] ?? turn.phase} for ${span(now - turn.since)}${where}${held}.${more}`;
}

function sentence(row, now, forecast) {
  const elapsed = Math.max(0, now - sinceOf(row));
  const since = span(elapsed);
  switch (row.state) {
    case "running":
      return runningSentence(row, now);
    case "held": {
      const { reason, pod } = row.held;
      return `A turn of ${count(row.held.tokens)} tokens has been held for ${since}: ${HELD[reason] ?? reason}. It would be served soonest on ${pod}.`;
    }
    case "ended":
      return `It has ended ${since} ago and is not expected back.`;
    case "idle":
      return `Its last turn failed ${since} ago; it may come again at once.`;
    default: {
      const names = row.tools ?? [];
      const what = row.state === "tool" ? names.join(", ") || "a tool" : row.state === "human" ? `a person${names.length ? ` (${names.join(", ")})` : ""}` : "what it left running";
      const told = `It has waited ${since} for ${what}.`;
      if (!forecast) return told;
      const { remaining_s: left, p_return: p } = forecast;
      return `${told} From now, half of such waits end within ${span(left.p50)}, 80 % between ${span(left.p10)} and ${span(left.p90)}; the chance that it returns at all is ${chance(p)}.`;
    }
  }
}

const chance = (p) => percent(p, p > 0.99 && p < 1 ? 1 : 0);

/** The gap's survival curve over log time, what is past, and where from now 50 and 80 % of the ends lie. */
function chart(session) {
  const { survival, remaining_s: left, p_return: p } = session.forecast;
  const elapsed = session.idle_seconds ?? 0;
  const W = 420;
  const H = 108;
  const B = 88;
  const least = 0.05;
  const most = Math.max(60, elapsed * 4, survival.at(-1)[0], elapsed + left.p90);
  const x = (s) => (W * Math.log(Math.max(s, least) / least)) / Math.log(most / least);
  const y = (share) => 6 + (B - 6) * (1 - share);
  const points = [[least, 1], ...survival, [most, survival.at(-1)[1]]];
  const line = points.map(([s, share]) => `${x(s).toFixed(1)},${y(share).toFixed(1)}`).join(" ");
  const parts = [];
  const band = (from, to, name) => parts.push(svg("rect", { class: name, x: x(from), y: 4, width: Math.max(1, x(to) - x(from)), height: B - 4 }));
  band(elapsed + left.p10, elapsed + left.p90, "band-80");
  parts.push(svg("line", { class: "median", x1: x(elapsed + left.p50), x2: x(elapsed + left.p50), y1: 4, y2: B }));
  for (const s of [0.1, 1, 10, 60, 600, 3600, 86400]) {
    if (s > most || s < least) continue;
    const label = s < 60 ? `${s} s` : s < 3600 ? `${s / 60} min` : `${s / 3600} h`;
    parts.push(
      svg("line", { class: "grid", x1: x(s), x2: x(s), y1: 4, y2: B }),
      svg("text", { x: x(s), y: H - 5, "text-anchor": x(s) > W - 16 ? "end" : "middle" }, label),
    );
  }
  parts.push(
    svg("polygon", { class: "area", points: `0,${B} ${line} ${W},${B}` }),
    svg("polyline", { class: "curve", points: line }),
    svg("line", { class: "base", x1: 0, x2: W, y1: B, y2: B }),
    svg("line", { class: "elapsed", x1: x(elapsed), x2: x(elapsed), y1: 2, y2: B }),
    svg("circle", { class: "elapsed-dot", cx: x(elapsed), cy: 4, r: 3 }),
  );
  const label = `Chance that the gap lasts longer, by time. Waited ${span(elapsed)}; median ${span(left.p50)} more; returns with ${chance(p)}.`;
  return h(
    "figure",
    { class: "chart", "data-state": session.idle_kind },
    svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": label }, parts),
    h("figcaption", {}, "Chance that the wait lasts longer. Dot: now. Shaded: where 80 % of the ends lie from now on, with the median."),
  );
}

function residency(session) {
  const pods = Object.entries(session.resident_tokens ?? {}).sort((a, b) => b[1] - a[1]);
  const need = session.prompt_tokens === null ? null : session.prompt_tokens + (session.output_tokens ?? 0);
  const most = Math.max(need ?? 1, ...pods.map(([, tokens]) => tokens), 1);
  const lines = pods.map(([pod, tokens]) =>
    h(
      "div",
      { class: "where" },
      h("span", {}, pod),
      h("span", { class: "extent" }, h("i", { class: "kvfill", vars: { width: `${(100 * tokens) / most}%` } })),
      h("span", { class: "right" }, need ? `${count(tokens)} of ${count(need)}` : count(tokens)),
    ),
  );
  const place = session.place;
  return h(
    "section",
    {},
    h("h3", {}, "KV and place"),
    lines.length ? lines : h("p", { class: "hint" }, "No pod is believed to hold any of its KV."),
    h(
      "p",
      { class: "hint" },
      place
        ? `It has a place on ${place.pod}: ${count(place.tokens)} tokens of its budget${place.lane === "aside" ? ", as an aside" : ""}, since ${clock(Date.parse(place.since) / 1000)}.`
        : session.held
          ? "It has no place: its turn waits for one."
          : "It has no place: its next turn goes through if it fits, and is held if not.",
    ),
  );
}

const lossesOf = (turn) => Object.entries(turn.lost ?? {});

function explanation(turn, reasons, before, id, seconds) {
  const parts = [];
  const fact = (label, ...content) => parts.push(h("dt", {}, label), h("dd", {}, ...content));
  if (turn.gap !== undefined) {
    const tools = before?.tools?.length && turn.gap === "tool" ? ` (${before.tools.join(", ")})` : "";
    const kind = { tool: "tool wait", human: "wait for a person", background: "background wait" }[turn.gap] ?? turn.gap;
    fact("Came", `${span(reasons.gap_s)} after the last answer: ${kind}${tools}. `, forecastOf(before, reasons.gap_s));
  }
  if (turn.break) {
    fact("Prefix break", `${BROKE[turn.break[0]] ?? turn.break[0]}: ${whole(turn.break[1])} tokens of the last prompt are of no more use.`);
  }
  const hold = reasons.hold;
  if (hold) {
    const still = turn.phase === "held";
    const size =
      hold.needed_tokens === undefined
        ? ""
        : ` It needed ${whole(hold.needed_tokens)} tokens on ${hold.soonest_at}, where ${whole(hold.free_tokens)} of a budget of ${whole(hold.budget_tokens)} were free, with ${hold.sessions_admitted} sessions admitted.`;
    const others = hold.others_held === 1 ? "1 other turn was held" : `${hold.others_held} other turns were held`;
    fact(
      "Held",
      h("b", {}, still ? `for ${span(seconds)} so far` : span(hold.seconds)),
      `: ${HELD[hold.reason] ?? hold.reason}.${size} ${others}; a place was expected after ${span(hold.expected_wait_s)}.${hold.priority === "batch" ? " It is a batch turn." : ""}`,
    );
    fact("On arrival", costs(hold.offered));
  }
  const route = reasons.route;
  if (route) {
    fact(
      "Routed",
      h("b", {}, route.pod),
      `: ${ROUTED[route.reason] ?? route.reason}.`,
      route.candidates.length > 1 || !hold ? costs(route) : "",
    );
  }
  if (turn.kv) {
    const [prompt, cached, output] = turn.kv;
    const believed = route?.candidates.find((c) => c.pod === route.pod)?.resident_tokens;
    fact(
      "Tokens",
      `${whole(prompt)} in the prompt`,
      cached === null ? ", cached ones not told" : `, ${whole(cached)} of them cached (${percent(cached / Math.max(1, prompt))})`,
      believed === undefined ? "" : `; ${whole(believed)} were believed to be there`,
      `. ${whole(output)} in the answer.`,
    );
  }
  for (const [cause, tokens] of lossesOf(turn)) {
    const [verb, why] = LOST[cause] ?? [cause, ""];
    fact(cause === "first_turn" ? "New" : "Lost", h("b", {}, whole(tokens)), ` tokens ${verb}: ${why}.`);
  }
  if (turn.end !== undefined && turn.end !== "ok") {
    fact("Ended", `${ENDED[turn.end] ?? turn.end}${reasons.status ? ` (status ${reasons.status})` : ""}.`);
  }
  if (reasons.attempts > 1) fact("Tries", `${reasons.attempts}: a pod failed before its first byte.`);
  if (turn.next) {
    fact("Then", `it ${NEXT[turn.next] ?? turn.next}${turn.next === "tool" ? ` ${(turn.tools ?? []).join(", ") || "a tool"}` : ""}. `, forecastOf(turn));
  }
  return h("dl", { class: "why", id: `${id}-why` }, parts);
}

function forecastOf(turn, cameAfter) {
  const q = turn?.q;
  if (!q || q[2] === null) return "";
  const high = q[4] === null ? "later" : span(q[4]);
  let verdict = "";
  if (cameAfter !== undefined && q[0] !== null) {
    verdict = cameAfter < q[0] ? " Earlier than that." : q[4] !== null && cameAfter > q[4] ? " Later than that." : "";
  }
  return h("span", { class: "hint" }, `Forecast: median ${span(q[2])}, 80 % between ${span(q[0])} and ${high}.${verdict}`);
}

/** The pods that were weighed, each with what it would have cost, in seconds. */
function costs(route) {
  const most = Math.max(1e-6, ...route.candidates.map((c) => c.total_s));
  const rows = route.candidates.map((c) =>
    h(
      "tr",
      { class: c.pod === route.pod ? "chosen" : "" },
      h("th", { scope: "row" }, c.pod),
      h(
        "td",
        { class: "bars" },
        h(
          "span",
          { class: "stack", title: COSTS.map(([key, name]) => `${name} ${span(c[key] ?? 0)}`).join(", ") },
          COSTS.map(([key, name]) => c[key] > 0 && h("i", { class: `cost-${name}`, vars: { width: `${(100 * c[key]) / most}%` } })),
        ),
      ),
      h("td", { class: "right" }, c.total_s < 0.01 ? "<10 ms" : span(c.total_s)),
      h("td", { class: "right" }, count(c.resident_tokens)),
    ),
  );
  const more = route.weighed - route.candidates.length;
  return h(
    "div",
    { class: "costs" },
    h(
      "table",
      {},
      h("thead", {}, h("tr", {}, h("th", {}, "Pod"), h("th", {}, "To the first token"), h("th", { class: "right" }, "Sum"), h("th", { class: "right" }, "Resident"))),
      h("tbody", {}, rows),
    ),
    h(
      "p",
      { class: "hint costs-legend" },
      COSTS.map(([, name, why]) => h("span", { title: why }, h("i", { class: `cost-${name}` }), name)),
      more > 0 && `and ${more} more pods`,
    ),
  );
}
