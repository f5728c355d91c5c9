// The list of sessions: only the rows in view are elements, their lanes one canvas, so that
// thousands scroll like ten.

import { $, age, attr, count, h, percent, say, short, span } from "./dom.js";
import { STATE_NAMES, backAt, residentTokens, sinceOf } from "./store.js";
import { Axis, drawAxis, drawGrid, drawLane, drawNow, fit, hit, palette } from "./timeline.js";

export const ROW_PX = 36;
const OVERSCAN = 4;
const FRAME_MS = 100;

export const CLIENT_NAMES = {
  "claude-code": "Claude Code",
  codex: "Codex",
  opencode: "OpenCode",
  "qwen-code": "Qwen Code",
  cline: "Cline",
  goose: "goose",
  crush: "Crush",
  openhands: "OpenHands",
  litellm: "LiteLLM",
  aider: "aider",
  "anthropic-sdk": "Anthropic SDK",
  "openai-sdk": "OpenAI SDK",
  other: "Other client",
};
export const clientName = (client) => CLIENT_NAMES[client] ?? client;

const HELD_FOR = {
  no_room: "no room",
  after_a_due_turn: "in line",
  no_pod: "no pod",
};

/** What a session does now, in a few words. */
export function doing(row, now) {
  const since = age(now - sinceOf(row));
  switch (row.state) {
    case "running": {
      const turn = row.now?.[0];
      const what = turn?.phase === "decode" ? "answering" : turn?.phase === "prefill" ? "prefill" : "arriving";
      return [what, since];
    }
    case "held":
      return [`held, ${HELD_FOR[row.held.reason] ?? row.held.reason}`, since];
    case "tool": {
      const tools = row.tools ?? [];
      return [tools.length > 1 ? `${tools[0]} +${tools.length - 1}` : (tools[0] ?? "tool"), since];
    }
    case "human":
      return [row.tools?.[0] ? `person: ${row.tools[0]}` : "person", since];
    case "background":
      return ["background", since];
    case "ended":
      return ["ended", `${since} ago`];
    default:
      return ["turn failed", `${since} ago`];
  }
}

export class List {
  constructor(store, on) {
    this.store = store;
    this.on = on;
    this.entries = [];
    this.active = null;
    this.chosen = null;
    this.windowS = 180;
    this.frozenAt = null;
    this.viewport = $("viewport");
    this.rows = $("rows");
    this.lanes = $("lanes");
    this.axisCanvas = $("axis");
    this.pool = [];
    this.colours = palette();
    this.still = window.matchMedia("(prefers-reduced-motion: reduce)");
    this.drawnAt = 0;
    this.#listen();
    new ResizeObserver(() => this.layout()).observe(this.viewport);
    new ResizeObserver(() => this.layout()).observe(this.axisCanvas);
    const loop = (at) => {
      if (at - this.drawnAt >= (this.still.matches ? 1000 : FRAME_MS)) this.paint();
      requestAnimationFrame(loop);
    };
    requestAnimationFrame(loop);
  }

  now() {
    return this.frozenAt ?? this.store.now();
  }

  recolour() {
    this.colours = palette();
    this.layout();
  }

  show(entries) {
    this.entries = entries;
    this.rows.style.setProperty("height", `${entries.length * ROW_PX}px`);
    attr(this.viewport, "aria-rowcount", entries.length);
    this.render();
  }

  layout() {
    // The header's columns leave room for the scroll bar; the canvas lies over the lanes' column.
    const view = this.viewport;
    $("table").style.setProperty("--scrollbar", `${view.offsetWidth - view.clientWidth}px`);
    const axis = this.axisCanvas.getBoundingClientRect();
    this.lanes.style.setProperty("margin-left", `${axis.left - view.getBoundingClientRect().left}px`);
    this.lanes.style.setProperty("width", `${axis.width}px`);
    drawAxis(this.axisCanvas, this.windowS, this.colours);
    this.render();
    this.paint();
  }

  /** First and one beyond the last row in view. */
  range() {
    const first = Math.floor(this.viewport.scrollTop / ROW_PX);
    const last = Math.ceil((this.viewport.scrollTop + this.viewport.clientHeight) / ROW_PX);
    return [
      Math.max(0, first - OVERSCAN),
      Math.min(this.entries.length, last + OVERSCAN),
    ];
  }

  inView() {
    const [first, last] = this.range();
    return this.entries.slice(first, last).map((entry) => entry.row.id);
  }

  render() {
    const [first, last] = this.range();
    const size = last - first;
    while (this.pool.length < size) {
      const element = this.#make();
      this.pool.push(element);
      this.rows.append(element.root);
    }
    // A row of the pool keeps its index for as long as it is in view: no flicker, few changes.
    const used = new Set();
    for (let index = first; index < last; index += 1) {
      const element = this.pool[index % this.pool.length];
      used.add(element);
      this.#fill(element, index);
    }
    for (const element of this.pool) {
      if (!used.has(element) && element.index !== null) {
        element.index = null;
        element.root.hidden = true;
      }
    }
    const active = this.entries.findIndex((entry) => entry.row.id === this.active);
    attr(this.viewport, "aria-activedescendant", active >= first && active < last ? `row-${active}` : null);
    this.on.view();
  }

  #make() {
    const e = { index: null };
    e.fold = h("button", { type: "button", class: "fold", tabindex: "-1", "aria-hidden": "true" });
    e.dot = h("i", { class: "dot" });
    e.client = h("b");
    e.id = h("code");
    e.badges = h("span", { class: "badges" });
    e.what = h("span", { class: "what" });
    e.since = h("span", { class: "since" });
    e.kv = h("span");
    e.meter = h("span", { class: "meter", "aria-hidden": "true" }, (e.meterFill = h("i")));
    e.pod = h("span", { class: "podname" });
    e.turns = h("span");
    const cell = (name, ...children) => h("div", { class: name, role: "gridcell" }, ...children);
    e.root = h(
      "div",
      { class: "row", role: "row" },
      (e.session = cell("session", e.fold, e.dot, e.client, e.id, e.badges)),
      cell("now", e.what, e.since),
      cell("lane"),
      cell("kv right", e.meter, e.kv),
      cell("home", e.pod),
      cell("turns right", e.turns),
    );
    return e;
  }

  #fill(e, index) {
    const entry = this.entries[index];
    const { row } = entry;
    if (e.index !== index) {
      e.index = index;
      e.root.hidden = false;
      e.root.id = `row-${index}`;
      e.root.style.setProperty("transform", `translateY(${index * ROW_PX}px)`);
      attr(e.root, "aria-rowindex", index + 1);
    }
    attr(e.root, "data-sid", row.id);
    attr(e.root, "data-state", row.state);
    attr(e.root, "aria-selected", row.id === this.chosen);
    e.root.classList.toggle("active", row.id === this.active);
    e.session.style.setProperty("--depth", entry.depth);
    e.session.classList.toggle("child", entry.depth > 0);
    e.fold.hidden = !entry.children;
    say(e.fold, entry.folded ? "▸" : "▾");
    say(e.client, entry.depth ? "Sub-agent" : clientName(row.client));
    say(e.id, short(row.id));
    const badges = [];
    if (row.parent && !entry.depth) badges.push("sub-agent");
    if (row.class === "auxiliary") badges.push("aside");
    if (row.folded || (entry.folded && entry.children)) badges.push(`+${entry.children}`);
    if (row.bg) badges.push(`${row.bg} in background`);
    say(e.badges, badges.join(" · "));
    const now = this.now();
    const [what, since] = doing(row, now);
    say(e.what, what);
    say(e.since, since);
    attr(e.root, "title", null);
    const resident = residentTokens(row);
    const whole = row.used ? row.used[0] + row.used[2] : row.place ? row.place[1] : 0;
    say(e.kv, resident ? count(resident) : whole ? `0 / ${count(whole)}` : "–");
    e.kv.classList.toggle("none", !resident);
    const share = whole ? Math.min(1, resident / whole) : 0;
    e.meterFill.style.setProperty("width", `${Math.round(100 * share)}%`);
    say(e.pod, row.now?.[0]?.pod ?? row.pod ?? "–");
    attr(e.pod, "data-place", Boolean(row.place));
    say(e.turns, String(row.turns));
    attr(
      e.root,
      "aria-label",
      `${clientName(row.client)} ${short(row.id)}, ${STATE_NAMES[row.state] ?? row.state}: ${what} ${since},` +
        ` ${resident ? count(resident) : "no"} tokens resident, pod ${row.pod ?? "none"}, ${row.turns} turns`,
    );
  }

  /** Ages move on. */
  tick() {
    for (const e of this.pool) if (e.index !== null && e.index < this.entries.length) this.#fill(e, e.index);
  }

  paint() {
    this.drawnAt = performance.now();
    const { pen, width, height } = fit(this.lanes);
    if (!width || !height) return;
    const axis = new Axis(this.now(), this.windowS, width);
    this.axis = axis;
    drawGrid(pen, axis, height, this.colours);
    const top = this.viewport.scrollTop;
    const [first, last] = this.range();
    for (let index = first; index < last; index += 1) {
      const { row } = this.entries[index];
      const y = index * ROW_PX - top + ROW_PX / 2;
      drawLane(pen, axis, y, row, this.store.turnsOf(row.id), this.colours);
    }
    drawNow(pen, axis, height, this.colours);
  }

  choose(sid) {
    this.chosen = sid;
    if (sid !== null) this.active = sid;
    this.render();
  }

  reveal(sid) {
    const index = this.entries.findIndex((entry) => entry.row.id === sid);
    if (index < 0) return;
    const top = index * ROW_PX;
    const view = this.viewport;
    if (top < view.scrollTop) view.scrollTop = top;
    else if (top + ROW_PX > view.scrollTop + view.clientHeight) view.scrollTop = top + ROW_PX - view.clientHeight;
  }

  #move(by) {
    if (!this.entries.length) return;
    let index = this.entries.findIndex((entry) => entry.row.id === this.active);
    index = index < 0 ? (by > 0 ? this.range()[0] : 0) : Math.min(this.entries.length - 1, Math.max(0, index + by));
    this.active = this.entries[index].row.id;
    this.reveal(this.active);
    this.render();
    if (this.chosen !== null) this.on.choose(this.active);
  }

  #listen() {
    const view = this.viewport;
    view.addEventListener("scroll", () => {
      this.render();
      this.paint();
    }, { passive: true });
    view.addEventListener("click", (event) => {
      const root = event.target.closest(".row");
      if (!root) return;
      const sid = root.dataset.sid;
      if (event.target.closest(".fold")) {
        this.on.fold(sid);
        return;
      }
      const over = this.#over(event);
      this.on.choose(sid, over?.turn?.n ?? null);
    });
    view.addEventListener("keydown", (event) => {
      const page = Math.max(1, Math.floor(view.clientHeight / ROW_PX) - 1);
      const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -1e9, End: 1e9 };
      if (event.key in steps) this.#move(steps[event.key]);
      else if (event.key === "Enter" && this.active !== null) this.on.choose(this.active);
      else if ((event.key === "ArrowLeft" || event.key === "ArrowRight") && this.active !== null) {
        const entry = this.entries.find((one) => one.row.id === this.active);
        if (entry?.children && entry.folded === (event.key === "ArrowRight")) this.on.fold(this.active);
      } else return;
      event.preventDefault();
    });
    view.addEventListener("focus", () => {
      if (this.active === null && this.entries.length) {
        this.active = this.entries[Math.min(this.range()[0] + OVERSCAN * (view.scrollTop > 0), this.entries.length - 1)].row.id;
        this.render();
      }
    });
    view.addEventListener("mousemove", (event) => {
      const over = this.#over(event);
      this.on.tip(over && tipOf(over, this.now()), event.clientX, event.clientY);
    });
    view.addEventListener("mouseleave", () => this.on.tip(null));
  }

  #over(event) {
    if (!this.axis) return null;
    const box = this.lanes.getBoundingClientRect();
    const x = event.clientX - box.left;
    if (x < 0 || x > box.width) return null;
    const index = Math.floor((event.clientY - box.top + this.viewport.scrollTop) / ROW_PX);
    const entry = this.entries[index];
    return entry ? hit(this.axis, x, entry.row, this.store.turnsOf(entry.row.id)) : null;
  }
}

const WAITS = { tool: "waited for", human: "waited for a person", background: "waited for the background", idle: "gap" };

/** Lines of text about what the pointer is over: [strong, rest …]. */
function tipOf({ turn, running, wait }, now) {
  if (wait) {
    const seconds = (wait.to ?? now) - wait.from;
    const tools = wait.before?.tools ?? [];
    const what = wait.kind === "tool" ? `${WAITS.tool} ${tools.join(", ") || "a tool"}` : (WAITS[wait.kind] ?? "gap");
    const lines = [`${span(seconds)} · ${what}`];
    const { q, p } = wait.before ?? {};
    if (q?.[2] !== undefined && q[2] !== null) {
      lines.push(`forecast: median ${span(q[2])}, 80 % in ${span(q[0])} – ${q[4] === null ? "later" : span(q[4])}`);
    }
    if (p !== undefined && wait.to === null) lines.push(`returns at all: ${percent(p)}`);
    return lines;
  }
  const lines = [];
  if (running) {
    lines.push(`turn ${turn.n} · ${turn.phase === "decode" ? "answering" : turn.phase} for ${span(now - turn.at)}`);
    if (turn.pod) lines.push(`on ${turn.pod}`);
  } else {
    lines.push(`turn ${turn.n} · ${span(turn.s)}${turn.pod ? ` on ${turn.pod}` : ""}`);
    if (turn.end !== "ok") lines.push(`ended: ${turn.end.replaceAll("_", " ")}`);
    if (turn.kv) {
      const [prompt, cached, output] = turn.kv;
      lines.push(
        `${count(prompt)} prompt${cached === null ? "" : `, ${percent(cached / Math.max(1, prompt))} cached`}, ${count(output)} out`,
      );
    }
  }
  if (turn.held) lines.push(`held ${span(turn.held)}`);
  if (turn.break) lines.push(`prefix break: ${turn.break[0]}, ${count(turn.break[1])} tokens`);
  for (const [cause, tokens] of Object.entries(turn.lost ?? {})) {
    if (cause !== "first_turn" && cause !== "prefix_break") lines.push(`${count(tokens)} tokens ${cause.replaceAll("_", " ")}`);
  }
  if (turn.tools?.length) lines.push(`then ${turn.tools.join(", ")}`);
  return lines;
}
