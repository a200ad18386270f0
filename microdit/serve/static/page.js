"use strict";
// The page of `microdit app`: it begins jobs, looks at them until they end, and shows their pictures.

const LOOK_EVERY = 250; // milliseconds
const GALLERY = 200; // pictures that the page keeps
const byId = (id) => document.getElementById(id);

async function ask(method, address, body) {
  let answer;
  try {
    answer = await fetch(address, { method, headers: { "Content-Type": "application/json" }, body: body && JSON.stringify(body) });
  } catch {
    throw new Error("The server does not answer: is microdit app still running?");
  }
  const told = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(told.error ? told.error.message : `The server answered ${answer.status}.`);
  return told;
}

function say(sentence) {
  byId("message").textContent = sentence;
  byId("message").hidden = !sentence;
}

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// Fields: [name, label, element, wide]. Text is kept as it is; numbers are read by the server, which says what is wrong with them.
function field(form, name, label, element, wide) {
  element.name = name;
  const inside = name === "seed" ? make("span", { className: "dice" }, element, dice(element)) : element;
  form.append(make("label", { className: wide ? "wide" : "" }, label, inside));
}

function dice(input) {
  const throwIt = () => (input.value = Math.floor(Math.random() * 2 ** 31));
  return make("button", { type: "button", textContent: "⚄", title: "Another seed", onclick: throwIt });
}

const number = (value, more) => make("input", { type: "number", step: "any", value, ...more });
const choice = (options) => make("select", {}, ...options.map((option) => make("option", { value: option, textContent: option })));

function settingsFields(form, about) {
  field(form, "model", "Model", choice(Object.keys(about.models)), true);
  field(form, "guidance_scale", "Guidance", number(about.guidance));
  field(form, "steps", "Steps", number(about.steps));
  field(form, "solver", "Solver", choice(about.solvers));
}

function promptFields(form, about) {
  field(form, "prompt", "Prompt", make("textarea", { placeholder: "red heart" }), true);
  field(form, "negative_prompt", "Not this (negative prompt)", make("input"), true);
}

function pictureFields(form, about) {
  field(form, "seed", "Seed", number(0));
  field(form, "size", "Size", make("input", { value: Object.values(about.models)[0] }));
  field(form, "n", "Pictures", number(4, { min: 1, max: about.pictures }));
}

const NUMBERS = ["guidance_scale", "steps", "seed", "n"];

function read(...places) {
  const fields = {};
  for (const place of places) {
    for (const input of place.querySelectorAll("[name]")) {
      if (NUMBERS.includes(input.name)) fields[input.name] = input.value === "" ? null : Number(input.value);
      else fields[input.name] = input.value;
    }
  }
  return fields;
}

class Watch {
  // One job. `show(told)` is called each time that it is looked at.
  constructor(show) {
    this.show = show;
    this.id = null;
  }
  async draw(fields) {
    this.id = (await ask("POST", "api/jobs", fields)).id;
    for (;;) {
      const told = await ask("GET", `api/jobs/${this.id}`);
      this.show(told);
      if (["done", "failed", "cancelled"].includes(told.state)) return told;
      await new Promise((later) => setTimeout(later, LOOK_EVERY));
    }
  }
  async cancel() {
    if (this.id) await ask("DELETE", `api/jobs/${this.id}`);
  }
}

function words(told) {
  return [state(told), ...(told.warnings ?? [])].join(" ");
}

function state(told) {
  if (told.state === "waiting") return told.place ? `Waiting: ${told.place} before.` : "Waiting.";
  if (told.state === "running") return `Drawing: ${Math.floor((100 * told.done) / told.all)}%`;
  return { done: "Done.", cancelled: "Cancelled.", failed: "Failed." }[told.state];
}

function showPictures(place, told, prompt) {
  if (!told.pictures) return told.state === "cancelled" && place.replaceChildren();
  place.classList.toggle("unfinished", told.state !== "done");
  place.replaceChildren(...told.pictures.map((address, i) => picture(address, prompt, told.seed + i)));
}

function picture(address, prompt, seed) {
  const image = make("img", { src: address, alt: prompt || "picture" });
  return make("figure", { title: `${prompt} (seed ${seed})` }, image, make("figcaption", { textContent: `${seed} · ${prompt || "empty prompt"}` }));
}

function keep(told, prompt) {
  const gallery = byId("gallery");
  gallery.querySelector("p")?.remove();
  gallery.prepend(...told.pictures.map((address, i) => picture(address, prompt, told.seed + i)));
  while (gallery.children.length > GALLERY) gallery.lastChild.remove();
}

// While `work` is done its button rests and `cancel` may be pressed; what goes wrong is said on the page.
async function busy(form, cancel, watches, work) {
  const button = form.querySelector(".main");
  say("");
  button.disabled = true;
  cancel.disabled = false;
  cancel.onclick = () => Promise.all(watches.map((watch) => watch.cancel())).catch((error) => say(error.message));
  try {
    await work();
  } catch (error) {
    say(error.message);
    await Promise.all(watches.map((watch) => watch.cancel())).catch(() => {});
  } finally {
    button.disabled = false;
    cancel.disabled = true;
  }
}

function startDraw(about) {
  const form = byId("draw-form"), fields = form.querySelector(".fields");
  promptFields(fields, about);
  settingsFields(fields, about);
  pictureFields(fields, about);
  form.onsubmit = (event) => {
    event.preventDefault();
    const asked = read(fields);
    const watch = new Watch((told) => {
      byId("progress").value = told.done / told.all;
      byId("state").textContent = words(told);
      showPictures(byId("result"), told, asked.prompt);
    });
    busy(form, byId("cancel"), [watch], async () => {
      const told = await watch.draw(asked);
      if (told.state === "failed") say(told.error);
      if (told.state === "done") keep(told, asked.prompt);
    });
  };
}

function startCompare(about) {
  const form = byId("compare-form"), shared = form.querySelector(".shared"), sides = [...form.querySelectorAll(".fields")];
  sides.forEach((side) => settingsFields(side, about));
  const models = Object.keys(about.models);
  if (models.length > 1) sides[1].querySelector("[name=model]").value = models[1];
  else sides[1].querySelector("[name=guidance_scale]").value = 2 * about.guidance;
  promptFields(shared, about);
  pictureFields(shared, about);
  form.onsubmit = (event) => {
    event.preventDefault();
    const watches = ["left", "right"].map((name, i) => {
      const asked = read(shared, sides[i]);
      return Object.assign(new Watch((told) => {
        byId(`${name}-state`).textContent = `${words(told)} ${asked.model}, guidance ${asked.guidance_scale}, ${asked.steps} steps of ${asked.solver}`;
        showPictures(byId(name), told, asked.prompt);
      }), { asked });
    });
    busy(form, byId("compare-cancel"), watches, async () => {
      for (const told of await Promise.all(watches.map((watch) => watch.draw(watch.asked)))) {
        if (told.state === "failed") say(told.error);
        if (told.state === "done") keep(told, watches[0].asked.prompt);
      }
    });
  };
}

function startRun(about) {
  if (!about.runs.length) return;
  document.querySelector("[data-tab=run]").hidden = false;
  byId("run-name").replaceChildren(...choice(about.runs).children);
  const load = () => (byId("run-page").src = `api/runs/${encodeURIComponent(byId("run-name").value)}`);
  byId("run-name").onchange = byId("run-again").onclick = load;
  document.querySelector("[data-tab=run]").addEventListener("click", load);
}

function startBudget(about) {
  const form = byId("budget-form"), inputs = form.elements;
  inputs.recipe.replaceChildren(...choice(about.recipes).children);
  inputs.chip.replaceChildren(...choice(about.chips).children);
  inputs.chip.value = about.chips.find((name) => name.startsWith("H100 SXM")) ?? about.chips[0];
  form.onsubmit = async (event) => {
    event.preventDefault();
    say("");
    try {
      const file = inputs.file.files[0], asked = { chip: inputs.chip.value };
      for (const name of ["count", "price", "mfu", "images", "dollars"]) asked[name] = inputs[name].value === "" ? null : Number(inputs[name].value);
      if (file) asked.text = await file.text();
      else asked.recipe = inputs.recipe.value;
      byId("bill").textContent = (await ask("POST", "api/budget", asked)).text;
    } catch (error) {
      byId("bill").textContent = "";
      say(error.message);
    }
  };
}

function openTab(name) {
  for (const tab of document.querySelectorAll("[role=tab]")) {
    tab.setAttribute("aria-selected", tab.dataset.tab === name);
    byId(tab.dataset.tab).hidden = tab.dataset.tab !== name;
  }
  say("");
}

async function start() {
  for (const tab of document.querySelectorAll("[role=tab]")) tab.addEventListener("click", () => openTab(tab.dataset.tab));
  openTab("draw");
  try {
    const about = await ask("GET", "api/about");
    for (const begin of [startDraw, startCompare, startRun, startBudget]) begin(about);
  } catch (error) {
    say(error.message);
  }
}

start();
