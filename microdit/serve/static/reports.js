// The tabs Run, Explain and Budget: reports that the server computes.

import { announce, busy, byId, say } from "./elements.js";
import { modelField, offerExamples, options, promptField, read, seedField } from "./forms.js";
import { poll, request, sleep } from "./requests.js";

export const LIVE = { seconds: 5, share: 0.1 }; // at least between two looks at a run, and the share of the time that reports may take

export function startRun(about) {
  const panel = byId("run"), name = byId("run-name");
  if (!about.runs.length) return;
  byId("tab-run").hidden = false;
  name.replaceChildren(...options(about.runs));
  let newest = 0; // the number of the last watch: only that one goes on
  const watch = () => {
    const mine = ++newest;
    watchRun(encodeURIComponent(name.value), () => mine === newest && !panel.hidden).catch((error) => say(error.message));
  };
  name.onchange = byId("run-reload").onclick = watch;
  panel.addEventListener("open", watch);
}

// Show a run's report, and renew it as long as the run is training and `goesOn()`.
async function watchRun(run, goesOn) {
  const frame = byId("run-page"), tell = (sentence) => goesOn() && (byId("run-updated").textContent = sentence);
  let shown = { state: "", modified: null }, wait = LIVE.seconds;
  while (goesOn()) {
    const now = document.hidden ? shown : await poll(`api/run-states/${run}`, tell);
    if (!goesOn()) return;
    if (now.modified !== shown.modified || now.state !== shown.state) {
      const start = performance.now();
      if (shown.modified !== null && frame.contentDocument.querySelector("main")) await renew(frame.contentWindow, `api/runs/${run}`, goesOn);
      else await load(frame, `api/runs/${run}`);
      wait = Math.max(LIVE.seconds, (performance.now() - start) / 1000 / LIVE.share);
    }
    const isTraining = now.state === "running";
    if (now.state !== shown.state) announce(isTraining ? "The run is training." : `The run's state: ${now.state}.`);
    if (now !== shown) tell(`${isTraining ? "Training" : `Not training (${now.state})`}; last updated at ${new Date().toLocaleTimeString()}.`);
    if (!isTraining) return;
    shown = now;
    await sleep(wait);
  }
}

// Load a page of the server into a frame, and wait until it is there.
function load(frame, address) {
  return new Promise((loaded) => {
    frame.addEventListener("load", loaded, { once: true });
    frame.src = address;
  });
}

// Replace the body of the report in a frame's window by that of a newer report. What was scrolled to or opened stays so.
async function renew(inside, address, goesOn) {
  const response = await fetch(address).catch(() => null);
  if (!response?.ok || !goesOn()) return; // the next look at the run is patient
  const page = new inside.DOMParser().parseFromString(await response.text(), "text/html"); // under the policy of the report, not of this page
  const opened = (document) => [...document.querySelectorAll("details")];
  const open = opened(inside.document).filter((one) => one.open).map((one) => one.textContent);
  opened(page).forEach((one) => (one.open = open.includes(one.textContent)));
  inside.document.body.replaceWith(page.body);
}

export function startExplain(about) {
  const form = byId("explain-form"), fields = form.querySelector(".fields"), frame = byId("explain-page");
  modelField(fields, about);
  promptField(fields);
  seedField(fields);
  offerExamples(form, about);
  form.onsubmit = (event) => {
    event.preventDefault();
    const leaving = new AbortController();
    const tell = (sentence) => {
      byId("explain-state").textContent = sentence;
      announce(sentence);
    };
    const cancel = async () => leaving.abort();
    busy(form, cancel, async () => {
      tell("Generating and explaining an image.");
      try {
        const { id } = await request("POST", "api/explanations", { body: read(form), signal: leaving.signal });
        await load(frame, `api/explanations/${id}`);
        frame.hidden = false;
        tell("The explanation is below.");
      } catch (error) {
        tell(error.cancelled ? "Cancelled." : "");
        if (!error.cancelled) throw error;
      }
    });
  };
}

export function startBudget(about) {
  const form = byId("budget-form"), inputs = form.elements;
  inputs.recipe.replaceChildren(...options(about.recipes));
  inputs.chip.replaceChildren(...options(about.chips));
  inputs.chip.value = about.chips.find((name) => name.startsWith("H100 SXM")) ?? about.chips[0];
  form.onsubmit = async (event) => {
    event.preventDefault();
    say("");
    try {
      byId("estimate").textContent = (await request("POST", "api/budget", { body: await readBudget(inputs) })).text;
      announce("The estimate is below the form.");
    } catch (error) {
      byId("estimate").textContent = "";
      say(error.message);
    }
  };
}

async function readBudget(inputs) {
  const file = inputs.file.files[0], wanted = { chip: inputs.chip.value };
  for (const name of ["count", "price", "mfu", "images", "dollars"]) wanted[name] = inputs[name].value === "" ? null : Number(inputs[name].value);
  if (file) wanted.text = await file.text();
  else wanted.recipe = inputs.recipe.value;
  return wanted;
}
