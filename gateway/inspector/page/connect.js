// How to point agents here: the snippets of `cachewise connect`, filled in.

import { h, say } from "./dom.js";
import { json } from "./link.js";

let asked = null;

async function guide() {
  asked ??= json("connect").catch((error) => {
    asked = null;
    throw error;
  });
  return asked;
}

/** The gateway's own address: the page's, without its last folder. */
function gatewayUrl() {
  return new URL("..", document.baseURI).href.replace(/\/$/, "");
}

/** Fill `root` with tabs of snippets. */
export async function snippets(root, prefix) {
  const { clients, models, keys_required: keyed } = await guide();
  const values = { url: gatewayUrl(), model: models[0] ?? "MODEL", key: keyed ? "YOUR_KEY" : "any" };
  let chosen = 0;
  const code = h("code");
  const copied = h("span", { class: "copied", role: "status" });
  const copy = h("button", { type: "button", class: "quiet copy", onclick: () => copyText(code.textContent, code, copied) }, "Copy");
  const notes = h("p", { class: "hint notes" });
  const panel = h("div", { class: "snippet", role: "tabpanel", id: `${prefix}-panel`, tabindex: "0" }, h("div", { class: "code" }, h("pre", {}, code), copy, copied), notes);
  const tabs = clients.map((client, index) =>
    h(
      "button",
      {
        type: "button",
        role: "tab",
        id: `${prefix}-tab-${index}`,
        "aria-controls": `${prefix}-panel`,
        onclick: () => choose(index),
        onkeydown: (event) => {
          const step = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 }[event.key];
          if (!step) return;
          event.preventDefault();
          choose((index + step + clients.length) % clients.length);
          tabs[chosen].focus();
        },
      },
      client.name,
    ),
  );
  const filled = (text) => text.replace(/\{(url|model|key)\}/g, (_, name) => values[name]);
  function choose(index) {
    chosen = index;
    tabs.forEach((tab, i) => {
      tab.setAttribute("aria-selected", String(i === index));
      tab.tabIndex = i === index ? 0 : -1;
    });
    panel.setAttribute("aria-labelledby", tabs[index].id);
    say(code, filled(clients[index].setup));
    // Notes are Markdown of words and `code`.
    notes.replaceChildren(...filled(clients[index].notes).split("`").map((part, i) => (i % 2 ? h("code", {}, part) : part)));
    say(copied, "");
  }
  const select =
    models.length > 1 &&
    h(
      "label",
      { class: "model" },
      "Model ",
      h(
        "select",
        {
          onchange: (event) => {
            values.model = event.target.value;
            choose(chosen);
          },
        },
        models.map((model) => h("option", { value: model }, model)),
      ),
    );
  root.replaceChildren(
    h("div", { class: "tabs", role: "tablist", "aria-label": "Clients", "aria-orientation": "vertical" }, tabs),
    h("div", { class: "tab-body" }, select || "", panel),
  );
  choose(0);
}

async function copyText(text, element, told) {
  try {
    await navigator.clipboard.writeText(text);
    say(told, "Copied");
  } catch {
    const range = document.createRange(); // no clipboard over plain HTTP: select it
    range.selectNodeContents(element);
    const selection = getSelection();
    selection.removeAllRanges();
    selection.addRange(range);
    say(told, "Selected: copy it with the keyboard");
  }
}
