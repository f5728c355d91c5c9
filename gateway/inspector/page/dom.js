// Making elements, and saying numbers and times. Text only ever becomes text: nothing here or
// elsewhere on the page parses HTML.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, props, children) {
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "class") element.setAttribute("class", value);
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "vars") for (const [k, v] of Object.entries(value)) element.style.setProperty(k, v);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** An element; `vars` are CSS properties, `on…` listeners, all else attributes. */
export function h(tag, props = {}, ...children) {
  return fill(document.createElement(tag), props, children);
}

export function svg(tag, props = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), props, children);
}

export const $ = (id) => document.getElementById(id);

/** Set an element's text only if it differs: most of what is shown does not change. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export function attr(element, name, value) {
  if (value === null || value === undefined || value === false) {
    if (element.hasAttribute(name)) element.removeAttribute(name);
  } else if (element.getAttribute(name) !== String(value)) {
    element.setAttribute(name, String(value));
  }
}

/** 1234 → 1.2k */
export function count(n) {
  if (n === null || n === undefined) return "–";
  const size = Math.abs(n);
  if (size < 1000) return String(Math.round(n));
  if (size < 9950) return `${(n / 1000).toFixed(1)}k`;
  if (size < 999_500) return `${Math.round(n / 1000)}k`;
  if (size < 9_950_000) return `${(n / 1e6).toFixed(1)}M`;
  return `${Math.round(n / 1e6)}M`;
}

export const whole = new Intl.NumberFormat("en").format;

/** Seconds as people say them; the spaces do not break. */
export function span(s) {
  if (s === null || s === undefined || !Number.isFinite(s)) return "–";
  if (s < 0) s = 0;
  if (s < 0.01) return "<10\u00a0ms";
  if (s < 1) return `${Math.round(s * 1000)}\u00a0ms`;
  if (s < 10) return `${s.toFixed(1)}\u00a0s`;
  if (s < 60) return `${Math.floor(s)}\u00a0s`;
  if (s < 3600) return `${Math.floor(s / 60)}\u00a0min\u00a0${pad(Math.floor(s % 60))}\u00a0s`;
  if (s < 86400) return `${Math.floor(s / 3600)}\u00a0h\u00a0${pad(Math.floor((s % 3600) / 60))}\u00a0min`;
  return `${Math.floor(s / 86400)}\u00a0d\u00a0${Math.floor((s % 86400) / 3600)}\u00a0h`;
}

/** The same in fewer letters, for rows. */
export function age(s) {
  if (!Number.isFinite(s)) return "";
  if (s < 0) s = 0;
  if (s < 10) return `${s.toFixed(1)} s`;
  if (s < 60) return `${Math.floor(s)} s`;
  if (s < 3600) return `${Math.floor(s / 60)}:${pad(Math.floor(s % 60))}`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${pad(Math.floor((s % 3600) / 60))}`;
  return `${Math.floor(s / 86400)} d`;
}

const pad = (n) => String(n).padStart(2, "0");

export function percent(share, digits = 0) {
  if (!Number.isFinite(share)) return "–";
  return `${(100 * share).toFixed(digits)}\u00a0%`;
}

export function clock(epochS) {
  return new Date(epochS * 1000).toLocaleTimeString("en-GB");
}

export const short = (sid) => sid.slice(0, 8);
