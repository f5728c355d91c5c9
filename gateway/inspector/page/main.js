// The page put together: what is shown follows what the gateway tells, two times a second.

import { snippets } from "./connect.js";
import { Detail } from "./detail.js";
import { $, attr, count, h, percent, say, span } from "./dom.js";
import { Refused, follow, json, token } from "./link.js";
import { List } from "./list.js";
import { Pods } from "./pods.js";
import { STATES, STATE_NAMES, Store, parseQuery, sinceOf } from "./store.js";

const AGAIN_MS = [500, 1_000, 2_000, 5_000];
const THEME = "cachewise.theme";

const store = new Store();
const view = { query: [], text: "", states: new Set(), sort: "started", folded: new Set() };
let paused = false;
let dirty = false;

const list = new List(store, {
  view: () => wantTurns(),
  choose: (sid, turn = null) => choose(sid, turn),
  fold: (sid) => {
    if (!view.folded.delete(sid)) view.folded.add(sid);
    refresh();
  },
  tip: showTip,
});
const detail = new Detail($("detail"), store, {
  close: () => choose(null),
  choose: (sid) => choose(sid),
  failed: (error) => {
    if (error instanceof Refused) askToken("");
  },
});
const pods = new Pods($("pods"), { filter: (name) => setQuery(view.text === `pod:${name}` ? "" : `pod:${name}`) });

// -- what is shown ---------------------------------------------------------------------------------

const chips = new Map();
for (const state of ["all", ...STATES]) {
  const number = h("b");
  const chip = h(
    "button",
    {
      type: "button",
      class: "chip",
      "data-state": state,
      "aria-pressed": "false",
      onclick: () => {
        if (state === "all") view.states.clear();
        else if (!view.states.delete(state)) view.states.add(state);
        refresh();
      },
    },
    state === "all" ? "" : h("i", { class: "dot" }),
    h("span", {}, state === "all" ? "All" : STATE_NAMES[state]),
    number,
  );
  chips.set(state, { chip, number });
  $("chips").append(chip);
}

const tiles = new Map();
for (const [key, label] of [
  ["sessions", "Sessions"],
  ["turns", "Turns"],
  ["cached", "Prompt cached"],
  ["held", "Held now"],
  ["lost", "KV lost"],
]) {
  const tile = { value: h("strong"), note: h("span") };
  tiles.set(key, tile);
  $("totals").append(h("div", { class: "tile", "data-tile": key }, h("h2", {}, label), tile.value, tile.note));
}

function refresh() {
  dirty = false;
  const { all, counts } = store.counts(view.query);
  for (const [state, { chip, number }] of chips) {
    const n = state === "all" ? all : counts[state];
    say(number, String(n));
    attr(chip, "aria-pressed", state === "all" ? view.states.size === 0 : view.states.has(state));
    chip.hidden = (state === "idle" || state === "background") && !n && !view.states.has(state);
  }
  const entries = store.list(view);
  list.show(entries);
  pods.show(store.pods);
  showTotals();
  const total = store.gateway?.sessions ?? store.sessions.size;
  const told = entries.length === store.sessions.size ? "" : `${count(entries.length)} of `;
  const beyond = total > store.sessions.size && store.complete ? `; the gateway knows ${count(total)}` : "";
  say($("shown"), store.sessions.size ? `${told}${count(store.sessions.size)} sessions${beyond}` : "");
  showEmpty(entries.length);
  detail.refresh();
}

function showTotals() {
  const minute = store.lastMinute();
  const seconds = Math.round(minute.seconds);
  const lately = seconds >= 60 ? "last minute" : `last ${seconds} s`;
  const put = (key, value, note) => {
    say(tiles.get(key).value, value);
    say(tiles.get(key).note, note);
  };
  if (!store.complete) {
    for (const key of tiles.keys()) put(key, "–", "");
    return;
  }
  let running = 0;
  let held = 0;
  let longest = 0;
  for (const row of store.sessions.values()) {
    if (row.state === "running") running += 1;
    if (row.state === "held") {
      held += 1;
      longest = Math.max(longest, store.now() - sinceOf(row));
    }
  }
  put("sessions", count(store.gateway?.sessions ?? store.sessions.size), `${running} running`);
  put("turns", `${((60 * minute.turns) / minute.seconds).toFixed(0)}/min`, minute.failed ? `${minute.failed} failed, ${lately}` : lately);
  put("cached", minute.prompt ? percent(minute.cached / minute.prompt, 1) : "–", minute.prompt ? `of ${count(minute.prompt)} tokens, ${lately}` : lately);
  put("held", String(held), held ? `longest ${span(longest)}` : store.gateway?.mode === "enforce" ? "admission enforces" : `admission: ${store.gateway?.mode ?? "–"}`);
  attr(tiles.get("held").value, "data-some", held > 0);
  const lost = Object.entries(minute.lost).sort((a, b) => b[1] - a[1]);
  const sum = lost.reduce((total, [, tokens]) => total + tokens, 0);
  put("lost", count(sum), lost.length ? `${lost.slice(0, 2).map(([cause, tokens]) => `${count(tokens)} ${cause.replaceAll("_", " ")}`).join(", ")}` : `tokens, ${lately}`);
}

let emptyFor = null;
function showEmpty(shown) {
  const kind = shown ? null : !store.complete ? "loading" : store.sessions.size ? "filtered" : "none";
  if (kind === emptyFor) return;
  emptyFor = kind;
  const root = $("empty");
  root.hidden = kind === null;
  $("table").classList.toggle("is-empty", kind !== null);
  document.querySelector(".foot").classList.toggle("is-empty", kind !== null);
  if (kind === "loading") root.replaceChildren(h("p", { class: "hint" }, "Reading the sessions …"));
  if (kind === "filtered") {
    root.replaceChildren(
      h("h2", {}, "No session fits"),
      h("p", { class: "hint" }, "Words are looked for in ids, clients, models, pods, tools and tenants; state:, pod:, tool:, client:, model:, tenant:, class: look in one."),
      h("button", { type: "button", class: "quiet boxed", onclick: () => { view.states.clear(); setQuery(""); } }, "Show all sessions"),
    );
  }
  if (kind === "none") {
    const box = h("div", { class: "snippets" });
    root.replaceChildren(
      h("h2", {}, "No session yet"),
      h("p", { class: "hint" }, "Point an agent at this gateway; its session appears here with its first turn. No change to the agent is needed."),
      box,
    );
    snippets(box, "empty").catch(() => box.replaceChildren(h("p", { class: "hint" }, "See docs/connect.md.")));
  }
}

let wantTimer = null;
function wantTurns() {
  wantTimer ??= setTimeout(async () => {
    wantTimer = null;
    const wanted = store.wanting(list.inView());
    for (let i = 0; i < wanted.length; i += 100) {
      const query = wanted.slice(i, i + 100).map((sid) => `session=${encodeURIComponent(sid)}`).join("&");
      try {
        const found = await json(`turns?${query}`);
        for (const [sid, turns] of Object.entries(found.data)) store.took(sid, turns);
      } catch {
        for (const sid of wanted) store.histories.delete(sid); // asked again when next in view
      }
    }
    if (wanted.length) list.paint();
  }, 60);
}

function choose(sid, turn = null) {
  list.choose(sid);
  document.body.classList.toggle("with-detail", sid !== null);
  if (sid === null) {
    detail.close();
    $("viewport").focus({ preventScroll: true });
  } else {
    detail.show(sid, turn);
  }
  history.replaceState(null, "", sid === null ? location.pathname : `#${sid}`);
  list.layout();
  if (sid !== null) list.reveal(sid);
}

function setQuery(text) {
  $("search").value = view.text = text;
  view.query = parseQuery(text);
  $("viewport").scrollTop = 0;
  refresh();
}

const tip = $("tip");
function showTip(lines, x = 0, y = 0) {
  if (!lines) {
    tip.hidden = true;
    return;
  }
  const [first, ...rest] = lines;
  tip.replaceChildren(h("b", {}, first), ...rest.map((line) => h("span", {}, line)));
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.setProperty("left", `${Math.max(8, Math.min(x + 14, innerWidth - width - 8))}px`);
  tip.style.setProperty("top", `${y + 18 + height > innerHeight ? y - height - 10 : y + 18}px`);
}

// -- the line ---------------------------------------------------------------------------------------

function setLink(state, text) {
  attr($("link"), "data-state", state);
  say($("link").querySelector("span"), text);
}

async function live() {
  for (let failures = 0; ; failures += 1) {
    try {
      await follow({
        hello: () => {
          failures = 0;
          store.begin();
          emptyFor = undefined;
          setLink("live", "live");
        },
        frame: (frame) => {
          store.take(frame);
          dirty = true;
          if (!paused && (frame.complete || store.complete)) schedule();
        },
      });
    } catch (error) {
      if (error instanceof Refused) {
        setLink("locked", "locked");
        await askToken(token.get() ? "The gateway does not know this token." : "");
        failures = -1;
        continue;
      }
      const reason = error.name === "AbortError" || error instanceof TypeError ? "no answer" : error.message;
      setLink("lost", `${reason}; trying again`);
    }
    await new Promise((resolve) => setTimeout(resolve, AGAIN_MS[Math.min(Math.max(failures, 0), AGAIN_MS.length - 1)]));
  }
}

let scheduled = false;
function schedule() {
  if (scheduled) return;
  scheduled = true;
  requestAnimationFrame(() => {
    scheduled = false;
    if (dirty && !paused) refresh();
  });
}

let asking = null;
function askToken(message) {
  const dialog = $("token");
  say($("token-error"), message);
  asking ??= new Promise((resolve) => {
    token.clear();
    $("token-input").value = "";
    dialog.showModal();
    $("token-form").onsubmit = (event) => {
      event.preventDefault();
      token.set($("token-input").value.trim());
      dialog.close();
      asking = null;
      resolve();
    };
  });
  return asking;
}
$("token").addEventListener("cancel", (event) => event.preventDefault());

// -- controls ---------------------------------------------------------------------------------------

function setPaused(on) {
  paused = on;
  list.frozenAt = on ? store.now() : null;
  attr($("pause"), "aria-pressed", on);
  say($("pause").querySelector("span"), on ? "Resume" : "Pause");
  document.body.classList.toggle("paused", on);
  if (!on) refresh();
}

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
  list.recolour();
}
function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}
function toggleTheme() {
  const theme = isDark() ? "light" : "dark";
  localStorage.setItem(THEME, theme);
  setTheme(theme);
}

$("search").addEventListener("input", (event) => {
  view.text = event.target.value;
  view.query = parseQuery(view.text);
  $("viewport").scrollTop = 0;
  refresh();
});
$("sort").addEventListener("change", (event) => {
  view.sort = event.target.value;
  refresh();
});
$("window").addEventListener("change", (event) => {
  list.windowS = Number(event.target.value);
  list.layout();
});
$("pause").addEventListener("click", () => setPaused(!paused));
$("theme").addEventListener("click", toggleTheme);
$("connect-open").addEventListener("click", () => {
  const dialog = $("connect");
  dialog.showModal();
  snippets(dialog.querySelector(".snippets"), "dialog").catch((error) => {
    if (error instanceof Refused) {
      dialog.close();
      askToken("");
    }
  });
});
for (const dialog of document.querySelectorAll("dialog:not(#token)")) {
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog || event.target.closest("[data-close]")) dialog.close();
  });
}
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  const typing = event.target.matches("input, select, textarea");
  if (event.key === "Escape") {
    if (event.target === $("search") && view.text) setQuery("");
    else if (event.target === $("search")) $("viewport").focus();
    else if (detail.sid !== null) choose(null);
  } else if (typing) {
    return;
  } else if (event.key === "/") {
    $("search").focus();
  } else if (event.key === "t") {
    toggleTheme();
  } else if (event.key === " " && !event.target.matches("button")) {
    setPaused(!paused);
  } else {
    return;
  }
  event.preventDefault();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => list.recolour());
setInterval(() => {
  if (paused || document.hidden) return;
  list.tick();
  detail.refresh();
  showTotals();
}, 500);

setTheme(localStorage.getItem(THEME));
refresh();
live();
/** The session that the address names. */
function named() {
  return /^#[0-9a-f]{32}$/.test(location.hash) ? location.hash.slice(1) : null;
}
addEventListener("hashchange", () => choose(named()));
if (named()) choose(named());
