// What the page knows: sessions, pods, the turns of the sessions that were looked at.

const SPANS_KEPT = 48;
const HISTORIES_KEPT = 400;
const MINUTE_S = 60;
const MAX_DEPTH = 6;

export const STATES = ["running", "held", "tool", "human", "background", "ended", "idle"];
export const STATE_NAMES = {
  running: "Running",
  held: "Held",
  tool: "Tool",
  human: "Person",
  background: "Background",
  ended: "Ended",
  idle: "Failed",
};
const FIELDS = {
  id: (row) => row.id,
  state: (row) => row.state,
  client: (row) => row.client,
  model: (row) => row.model,
  tenant: (row) => row.tenant,
  class: (row) => row.class,
  pod: (row) => podsOf(row).join(" "),
  tool: (row) => (row.tools ?? []).join(" "),
};

export function podsOf(row) {
  const pods = new Set(Object.keys(row.kv ?? {}));
  if (row.pod) pods.add(row.pod);
  for (const turn of row.now ?? []) if (turn.pod) pods.add(turn.pod);
  return [...pods];
}

export function residentTokens(row) {
  let most = 0;
  for (const tokens of Object.values(row.kv ?? {})) most = Math.max(most, tokens);
  return most;
}

/** Since when the session has been in its state, seconds of the epoch. */
export function sinceOf(row) {
  if (row.state === "held") return row.held.since;
  if (row.now?.length) return row.now[0].since;
  return row.since ?? row.seen;
}

/** When it is expected back (the forecast's median), or Infinity. */
export function backAt(row) {
  if (row.q === undefined || row.state === "ended") return Infinity;
  return row.q[2] === null ? Infinity : row.since + row.q[2];
}

export class Store {
  sessions = new Map();
  pods = new Map();
  gateway = null;
  complete = false;
  histories = new Map();
  /** Recent turns of all sessions, for the totals. */
  recent = [];
  watchedSince = 0;
  /** Server's clock minus this one's, seconds. */
  offset = null;

  now() {
    return Date.now() / 1000 + (this.offset ?? 0);
  }

  begin() {
    this.sessions.clear();
    this.pods.clear();
    this.histories.clear();
    this.recent = [];
    this.complete = false;
    this.offset = null;
  }

  take(frame) {
    const offset = frame.at - Date.now() / 1000;
    if (this.offset === null) {
      this.offset = offset;
      this.watchedSince = frame.at;
    }
    this.offset = Math.max(this.offset, offset); // the least delayed frame tells best
    for (const row of frame.sessions ?? []) this.sessions.set(row.id, row);
    for (const sid of frame.gone ?? []) {
      this.sessions.delete(sid);
      this.histories.delete(sid);
    }
    for (const pod of frame.pods ?? []) this.pods.set(pod.name, pod);
    for (const name of frame.gone_pods ?? []) this.pods.delete(name);
    if (frame.gateway) this.gateway = frame.gateway;
    if (frame.missed) this.histories.clear();
    for (const [sid, turn] of frame.turns ?? []) {
      this.recent.push(turn);
      const history = this.histories.get(sid);
      if (history) add(history.turns, turn);
    }
    const since = frame.at - MINUTE_S;
    while (this.recent.length && this.recent[0].at + this.recent[0].s < since) this.recent.shift();
    if (frame.complete) this.complete = true;
  }

  /** The turns of a session, oldest first; undefined where they were not asked for yet. */
  turnsOf(sid) {
    const history = this.histories.get(sid);
    if (history === undefined) return undefined;
    this.histories.delete(sid);
    this.histories.set(sid, history);
    return history.turns;
  }

  /** Of these sessions, those to ask for; turns that end meanwhile are kept. */
  wanting(sids) {
    const wanted = sids.filter((sid) => !this.histories.has(sid));
    for (const sid of wanted) this.histories.set(sid, { turns: [] });
    while (this.histories.size > HISTORIES_KEPT) {
      this.histories.delete(this.histories.keys().next().value);
    }
    return wanted;
  }

  took(sid, turns) {
    const history = this.histories.get(sid);
    if (history) for (const turn of turns) add(history.turns, turn);
  }

  /** What the last minute was like. */
  lastMinute() {
    const watched = Math.max(1, Math.min(MINUTE_S, this.now() - this.watchedSince));
    const found = { seconds: watched, turns: this.recent.length, prompt: 0, cached: 0, lost: {}, failed: 0 };
    for (const turn of this.recent) {
      if (turn.kv && turn.kv[1] !== null) {
        found.prompt += turn.kv[0];
        found.cached += turn.kv[1];
      }
      if (turn.end !== "ok") found.failed += 1;
      for (const [cause, tokens] of Object.entries(turn.lost ?? {})) {
        if (cause !== "first_turn") found.lost[cause] = (found.lost[cause] ?? 0) + tokens;
      }
    }
    return found;
  }

  counts(query) {
    const counts = Object.fromEntries(STATES.map((state) => [state, 0]));
    let all = 0;
    for (const row of this.sessions.values()) {
      if (!matches(row, query)) continue;
      counts[row.state] = (counts[row.state] ?? 0) + 1;
      all += 1;
    }
    return { all, counts };
  }

  /**
   * The sessions to show, in order, each with its depth: sub-agents under their parents. `folded`
   * are parents whose sub-agents are not shown.
   */
  list({ query, states, sort, folded }) {
    const found = [];
    for (const row of this.sessions.values()) {
      if (states.size && !states.has(row.state)) continue;
      if (matches(row, query)) found.push(row);
    }
    const key = SORTS[sort](this.now());
    const shown = new Map(found.map((row) => [row.id, row]));
    const parentOf = (row) => (row.parent !== row.id ? shown.get(row.parent) : undefined);
    const children = new Map();
    const roots = [];
    const order = new Map();
    for (const row of found) {
      const parent = parentOf(row);
      if (parent) {
        if (!children.has(parent.id)) children.set(parent.id, []);
        children.get(parent.id).push(row);
      } else {
        roots.push(row);
      }
      // A family stands where its most eager member would.
      let top = row;
      for (let hops = 0; hops < MAX_DEPTH && parentOf(top); hops += 1) top = parentOf(top);
      if (top === row || sort !== "started") {
        order.set(top.id, Math.min(order.get(top.id) ?? Infinity, key(row)));
      }
    }
    roots.sort((a, b) => order.get(a.id) - order.get(b.id) || (a.id < b.id ? -1 : 1));
    for (const own of children.values()) own.sort((a, b) => b.at - a.at || (a.id < b.id ? -1 : 1));
    const out = [];
    const seen = new Set();
    const visit = (root) => {
      const stack = [[root, 0]];
      while (stack.length) {
        const [row, depth] = stack.pop();
        if (seen.has(row.id)) continue;
        seen.add(row.id);
        const own = children.get(row.id) ?? [];
        out.push({ row, depth: Math.min(depth, MAX_DEPTH), children: own.length, folded: folded.has(row.id) });
        if (folded.has(row.id)) own.forEach((child) => seen.add(child.id));
        else for (const child of own) stack.push([child, depth + 1]);
      }
    };
    roots.forEach(visit);
    for (const row of found) if (!seen.has(row.id)) visit(row); // each other's parents, say
    return out;
  }
}

const SORTS = {
  started: () => (row) => -row.at,
  seen: () => (row) => -row.seen,
  waited: (now) => (row) => (row.state === "ended" ? 1 : sinceOf(row) - now),
  back: (now) => (row) => {
    const at = backAt(row);
    return row.now ? -1e9 : at === Infinity ? 1e12 : Math.max(at, now);
  },
  kv: () => (row) => -residentTokens(row),
  turns: () => (row) => -row.turns,
  broken: () => (row) => -(row.broken ?? 0),
};

/** `tool:bash held` → what each word asks for. */
export function parseQuery(text) {
  return text
    .toLowerCase()
    .split(/\s+/)
    .filter(Boolean)
    .map((word) => {
      const at = word.indexOf(":");
      const field = at > 0 ? word.slice(0, at) : "";
      return FIELDS[field] ? { field, value: word.slice(at + 1) } : { field: null, value: word };
    })
    .filter(({ value }) => value);
}

export function matches(row, query) {
  return query.every(({ field, value }) => {
    if (field) return FIELDS[field](row).toLowerCase().includes(value);
    return Object.values(FIELDS).some((read) => read(row).toLowerCase().includes(value));
  });
}

function add(turns, turn) {
  if (turns.some((known) => known.n === turn.n && known.at === turn.at)) return;
  turns.push(turn);
  turns.sort((a, b) => a.at - b.at);
  if (turns.length > SPANS_KEPT) turns.splice(0, turns.length - SPANS_KEPT);
}
