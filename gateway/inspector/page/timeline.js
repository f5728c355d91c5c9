// Drawing a session's time on a canvas: turns, holds, waits by what they are for, the forecast.

import { STATES } from "./store.js";

/** Of the width, what lies before now. */
export const PAST_SHARE = 0.76;
const TURN_PX = 14;
const WAIT_PX = 4;
const MIN_PX = 1.5;

/** Colours of the current theme, for canvases. */
export function palette() {
  const probe = document.createElement("i");
  probe.hidden = true;
  document.body.append(probe);
  const read = (name) => {
    probe.style.setProperty("color", `var(--${name})`);
    return getComputedStyle(probe).color;
  };
  const names = [...STATES, "prefill", "failed", "line", "line-strong", "muted", "text", "surface", "break", "lost", "now"];
  const colours = Object.fromEntries(names.map((name) => [name, read(name)]));
  probe.remove();
  colours.hatch = hatch(colours.held);
  return colours;
}

/** Held turns are told by a pattern too, not by colour alone. */
function hatch(colour) {
  const tile = document.createElement("canvas");
  tile.width = tile.height = 8;
  const pen = tile.getContext("2d");
  pen.globalAlpha = 0.3;
  pen.fillStyle = colour;
  pen.fillRect(0, 0, 8, 8);
  pen.globalAlpha = 1;
  pen.strokeStyle = colour;
  pen.lineWidth = 2;
  pen.beginPath();
  for (const x of [-8, 0, 8]) {
    pen.moveTo(x, 8);
    pen.lineTo(x + 8, 0);
  }
  pen.stroke();
  return pen.createPattern(tile, "repeat");
}

/** Fit a canvas to its box; returns its pen, scaled to CSS pixels, and its size. */
export function fit(canvas) {
  const { width, height } = canvas.getBoundingClientRect();
  const scale = window.devicePixelRatio || 1;
  const w = Math.round(width * scale);
  const hh = Math.round(height * scale);
  if (canvas.width !== w || canvas.height !== hh) {
    canvas.width = w;
    canvas.height = hh;
  }
  const pen = canvas.getContext("2d");
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  pen.clearRect(0, 0, width, height);
  return { pen, width, height };
}

/** Seconds of the epoch ↔ pixels; `windowS` is how much of the past is seen. */
export class Axis {
  constructor(now, windowS, width) {
    this.now = now;
    this.width = width;
    this.nowX = Math.round(width * PAST_SHARE) + 0.5;
    this.pxPerS = (width * PAST_SHARE) / windowS;
    this.from = now - windowS;
  }

  x(t) {
    return (t - this.from) * this.pxPerS;
  }

  t(x) {
    return this.from + x / this.pxPerS;
  }

  /** Seconds between two ticks: a round number of at least so many pixels. */
  step(leastPx = 90) {
    const steps = [5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600];
    return steps.find((s) => s * this.pxPerS >= leastPx) ?? 3600;
  }

  /** Ticks as [x, seconds from now]. */
  *ticks() {
    const step = this.step();
    for (let s = -Math.floor((this.now - this.from) / step) * step; this.nowX + s * this.pxPerS < this.width; s += step) {
      yield [Math.round(this.nowX + s * this.pxPerS) + 0.5, s];
    }
  }
}

function tickLabel(s) {
  if (s === 0) return "now";
  const size = Math.abs(s);
  const sign = s < 0 ? "−" : "+";
  if (size < 60) return `${sign}${size} s`;
  if (size < 3600) return `${sign}${size / 60} min`;
  return `${sign}${size / 3600} h`;
}

export function drawAxis(canvas, windowS, colours) {
  const { pen, width, height } = fit(canvas);
  const axis = new Axis(0, windowS, width);
  pen.font = "11px system-ui, sans-serif";
  pen.textBaseline = "middle";
  pen.textAlign = "center";
  for (const [x, s] of axis.ticks()) {
    const label = tickLabel(s);
    const half = pen.measureText(label).width / 2;
    if (x - half < 0 || x + half > width) continue;
    pen.fillStyle = s === 0 ? colours.text : colours.muted;
    pen.fillText(label, x, height / 2);
  }
}

/** The lines behind all lanes. */
export function drawGrid(pen, axis, height, colours) {
  pen.strokeStyle = colours.line;
  pen.lineWidth = 1;
  pen.beginPath();
  for (const [x, s] of axis.ticks()) {
    if (s === 0) continue;
    pen.moveTo(x, 0);
    pen.lineTo(x, height);
  }
  pen.stroke();
}

export function drawNow(pen, axis, height, colours) {
  pen.strokeStyle = colours.now;
  pen.lineWidth = 1;
  pen.beginPath();
  pen.moveTo(axis.nowX, 0);
  pen.lineTo(axis.nowX, height);
  pen.stroke();
}

/** One session's lane about `y`. `turns` are over, oldest first; the row tells the rest. */
export function drawLane(pen, axis, y, row, turns, colours) {
  const now = axis.now;
  let before = null;
  for (const turn of turns ?? []) {
    const end = turn.at + turn.s;
    if (before !== null) drawWait(pen, axis, y, before.end, turn.at, turn.gap ?? before.next, colours);
    before = { end: Math.max(end, before?.end ?? 0), next: turn.next };
    if (end >= axis.from - 1) drawTurn(pen, axis, y, turn, end, colours);
  }
  for (const turn of row.now ?? []) {
    if (before !== null) drawWait(pen, axis, y, before.end, turn.at, turn.gap ?? before.next, colours);
    drawRunning(pen, axis, y, turn, now, colours);
  }
  if (!row.now?.length && row.since !== undefined && row.state !== "ended") {
    drawForecast(pen, axis, y, row, colours);
    drawWait(pen, axis, y, row.since, now, row.state, colours);
  }
}

function bar(pen, axis, y, from, to, height, fill, radius = 2) {
  const left = Math.max(axis.x(from), -4);
  const right = Math.min(axis.x(to), axis.width + 4);
  if (right < -3 || left > axis.width) return;
  const width = Math.max(right - left, MIN_PX);
  pen.fillStyle = fill;
  pen.beginPath();
  pen.roundRect(left, y - height / 2, width, height, Math.min(radius, width / 2));
  pen.fill();
}

function drawTurn(pen, axis, y, turn, end, colours) {
  const ready = turn.at + (turn.held ?? 0);
  const failed = turn.end !== "ok";
  if (turn.held) bar(pen, axis, y, turn.at, ready, TURN_PX, colours.hatch);
  const first = turn.first !== undefined ? turn.at + turn.first : end;
  if (turn.first !== undefined || !turn.held) {
    if (failed) {
      bar(pen, axis, y, ready, end, TURN_PX, colours.failed);
    } else {
      bar(pen, axis, y, ready, end, TURN_PX, colours.prefill);
      if (end > first) bar(pen, axis, y, first, end, TURN_PX, colours.running);
    }
  }
  drawMarks(pen, axis.x(turn.at), y, turn, colours);
}

function drawRunning(pen, axis, y, turn, now, colours) {
  const ready = turn.phase === "held" ? now : turn.at + (turn.held ?? 0);
  if (ready > turn.at + 0.02) bar(pen, axis, y, turn.at, ready, TURN_PX, colours.hatch);
  if (turn.phase !== "held") {
    bar(pen, axis, y, ready, now, TURN_PX, colours.prefill);
    if (turn.phase === "decode") bar(pen, axis, y, turn.since, now, TURN_PX, colours.running);
  }
  drawMarks(pen, axis.x(turn.at), y, turn, colours);
}

function drawMarks(pen, x, y, turn, colours) {
  if (turn.break) {
    pen.fillStyle = colours.break;
    pen.beginPath();
    pen.moveTo(x, y - 14);
    pen.lineTo(x + 4, y - 10.5);
    pen.lineTo(x, y - 7);
    pen.lineTo(x - 4, y - 10.5);
    pen.fill();
  }
  if (turn.lost && Object.keys(turn.lost).some((cause) => cause !== "first_turn" && cause !== "prefix_break")) {
    pen.fillStyle = colours.lost;
    pen.beginPath();
    pen.moveTo(x - 4, y + 8);
    pen.lineTo(x + 4, y + 8);
    pen.lineTo(x, y + 14);
    pen.fill();
  }
}

function drawWait(pen, axis, y, from, to, kind, colours) {
  if (to <= from || axis.x(to) < 0) return;
  bar(pen, axis, y, from, to, WAIT_PX, colours[kind] ?? colours.idle, 0);
}

/** The forecast of the gap under way as it was made at its start; nothing where it has outlived it. */
function drawForecast(pen, axis, y, row, colours) {
  if (row.q === undefined) return;
  const edge = axis.t(axis.width) + 1;
  const [p10, p25, p50, p75, p90] = row.q.map((s) => (s === null ? edge : row.since + s));
  const colour = colours[row.state] ?? colours.idle;
  const future = Math.max(axis.now, row.since);
  const part = (from, to, height, alpha) => {
    from = Math.max(from, future);
    if (to <= from || axis.x(from) > axis.width) return;
    pen.globalAlpha = alpha;
    bar(pen, axis, y, from, Math.min(to, edge), height, colour, 3);
  };
  part(p10, p90, 10, 0.18);
  part(p25, p75, 10, 0.28);
  pen.globalAlpha = 1;
  if (p50 > future && axis.x(p50) < axis.width) {
    pen.fillStyle = colour;
    pen.fillRect(Math.round(axis.x(p50)) - 1, y - 8, 2, 16);
  }
}

/** What lies under a point of a lane: a turn, a wait, the forecast, or null. */
export function hit(axis, x, row, turns) {
  const t = axis.t(x);
  const near = 3 / axis.pxPerS;
  for (const turn of row.now ?? []) if (t >= turn.at - near && t <= axis.now + near) return { turn, running: true };
  let found = null;
  for (const turn of turns ?? []) {
    if (t >= turn.at - near && t <= turn.at + turn.s + near) found = { turn };
  }
  if (found) return found;
  let before = null;
  for (const turn of [...(turns ?? []), ...(row.now ?? [])]) {
    if (before && t > before.at + before.s && t < turn.at) {
      return { wait: { from: before.at + before.s, to: turn.at, kind: turn.gap ?? before.next, before } };
    }
    before = turn.s === undefined ? before : turn;
  }
  if (!row.now?.length && row.since !== undefined && t >= row.since && row.state !== "ended") {
    return { wait: { from: row.since, to: null, kind: row.state, before: before ?? { tools: row.tools, q: row.q, p: row.p } } };
  }
  return null;
}
