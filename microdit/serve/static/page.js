// The page of `microdit app`: its tabs, by the WAI-ARIA pattern of tabs that are activated as they are reached.

import { byId, say } from "./elements.js";
import { startCompare, startDraw } from "./generate.js";
import { startBudget, startExplain, startRun } from "./reports.js";
import { request } from "./requests.js";

const tabs = () => [...document.querySelectorAll("[role=tab]:not([hidden])")];

// Show the panel of a tab, which gets the event "open".
function openTab(chosen) {
  for (const tab of tabs()) {
    tab.setAttribute("aria-selected", tab === chosen);
    tab.tabIndex = tab === chosen ? 0 : -1;
    byId(tab.getAttribute("aria-controls")).hidden = tab !== chosen;
  }
  say("");
  byId(chosen.getAttribute("aria-controls")).dispatchEvent(new Event("open"));
}

function onTabKey(event) {
  const all = tabs(), at = all.indexOf(event.target);
  const next = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: all.length - 1 }[event.key];
  if (next === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
  event.preventDefault();
  const tab = all[(next + all.length) % all.length];
  tab.focus();
  openTab(tab);
}

async function start() {
  const list = document.querySelector("[role=tablist]");
  list.addEventListener("click", (event) => event.target.role === "tab" && openTab(event.target));
  list.addEventListener("keydown", onTabKey);
  openTab(tabs()[0]);
  try {
    const about = await request("GET", "api/about");
    for (const begin of [startDraw, startCompare, startRun, startExplain, startBudget]) begin(about);
  } catch (error) {
    say(error.message);
  }
}

start();
