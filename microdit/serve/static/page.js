"use strict";
// The page of `microdit app`: it starts jobs, polls them until they end, and shows their images.

const POLL_MILLISECONDS = 250;
const GALLERY = 200; // images that the page keeps
const byId = (id) => document.getElementById(id);

async function request(method, address, body) {
  let response;
  try {
    response = await fetch(address, { method, headers: { "Content-Type": "application/json" }, body: body && JSON.stringify(body) });
  } catch {
    throw new Error("The server does not respond: is microdit app still running?");
  }
  const content = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(content.error ? content.error.message : `The server responded with status ${response.status}.`);
  return content;
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

// Add a labelled field to a form. Its value is checked by the server, whose errors the page shows.
function field(form, name, label, element, wide) {
  element.name = name;
  const inside = name === "seed" ? make("span", { className: "dice" }, element, dice(element)) : element;
  form.append(make("label", { className: wide ? "wide" : "" }, label, inside));
}

function dice(input) {
  const roll = () => (input.value = Math.floor(Math.random() * 2 ** 31));
  return make("button", { type: "button", textContent: "⚄", title: "Random seed", onclick: roll });
}

const number = (value, more) => make("input", { type: "number", step: "any", value, ...more });
const choice = (options) => make("select", {}, ...options.map((option) => make("option", { value: option, textContent: option })));

function settingsFields(form, about) {
  const model = choice(Object.keys(about.models));
  const own = { guidance_scale: number(), steps: number(), solver: choice(about.solvers) };
  const suit = () => Object.entries(own).forEach(([name, input]) => (input.value = about.usual[model.value][name]));
  model.addEventListener("change", suit);
  suit();
  field(form, "model", "Model", model, true);
  field(form, "guidance_scale", "Guidance", own.guidance_scale);
  field(form, "steps", "Steps", own.steps);
  field(form, "solver", "Solver", own.solver);
}

function promptFields(form, about) {
  field(form, "prompt", "Prompt", make("textarea", { placeholder: "red heart" }), true);
  field(form, "negative_prompt", "Negative prompt", make("input"), true);
}

function imageFields(form, about) {
  field(form, "seed", "Seed", number(0));
  field(form, "size", "Size", make("input", { value: Object.values(about.models)[0] }));
  field(form, "n", "Images", number(4, { min: 1, max: about.pictures }));
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

// Follows one job: `show(status)` is called with each status that the server returns.
class JobWatch {
  constructor(show) {
    this.show = show;
    this.id = null;
  }
  async run(fields) {
    this.id = (await request("POST", "api/jobs", fields)).id;
    for (;;) {
      const status = await request("GET", `api/jobs/${this.id}`);
      this.show(status);
      if (["done", "failed", "cancelled"].includes(status.state)) return status;
      await new Promise((later) => setTimeout(later, POLL_MILLISECONDS));
    }
  }
  async cancel() {
    if (this.id) await request("DELETE", `api/jobs/${this.id}`);
  }
}

function statusText(status) {
  return [stateText(status), ...(status.warnings ?? [])].join(" ");
}

function stateText(status) {
  if (status.state === "waiting") return status.place ? `Waiting behind ${status.place} ${status.place === 1 ? "job" : "jobs"}.` : "Waiting.";
  if (status.state === "running") return `Generating: ${Math.floor((100 * status.done) / status.all)}%`;
  return { done: "Done.", cancelled: "Cancelled.", failed: "Failed." }[status.state];
}

function showImages(place, status, prompt) {
  if (!status.pictures) return status.state === "cancelled" && place.replaceChildren();
  place.classList.toggle("unfinished", status.state !== "done");
  place.replaceChildren(...status.pictures.map((address, i) => figure(address, prompt, status.seed + i)));
}

function figure(address, prompt, seed) {
  const image = make("img", { src: address, alt: prompt || "image" });
  return make("figure", { title: `${prompt} (seed ${seed})` }, image, make("figcaption", { textContent: `${seed} · ${prompt || "empty prompt"}` }));
}

function addToGallery(status, prompt) {
  const gallery = byId("gallery");
  gallery.querySelector("p")?.remove();
  gallery.prepend(...status.pictures.map((address, i) => figure(address, prompt, status.seed + i)));
  while (gallery.children.length > GALLERY) gallery.lastChild.remove();
}

// Run `work` with the form's button disabled and `cancel` enabled, and show its errors on the page.
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
  imageFields(fields, about);
  form.onsubmit = (event) => {
    event.preventDefault();
    const wanted = read(fields);
    const watch = new JobWatch((status) => {
      byId("progress").value = status.done / status.all;
      byId("state").textContent = statusText(status);
      showImages(byId("result"), status, wanted.prompt);
    });
    busy(form, byId("cancel"), [watch], async () => {
      const status = await watch.run(wanted);
      if (status.state === "failed") say(status.error);
      if (status.state === "done") addToGallery(status, wanted.prompt);
    });
  };
}

function startCompare(about) {
  const form = byId("compare-form"), shared = form.querySelector(".shared"), sides = [...form.querySelectorAll(".fields")];
  sides.forEach((side) => settingsFields(side, about));
  const models = Object.keys(about.models);
  if (models.length > 1) {
    const model = sides[1].querySelector("[name=model]");
    model.value = models[1];
    model.dispatchEvent(new Event("change"));
  } else sides[1].querySelector("[name=guidance_scale]").value = 2 * Object.values(about.usual)[0].guidance_scale;
  promptFields(shared, about);
  imageFields(shared, about);
  form.onsubmit = (event) => {
    event.preventDefault();
    const watches = ["left", "right"].map((name, i) => {
      const wanted = read(shared, sides[i]);
      return Object.assign(new JobWatch((status) => {
        byId(`${name}-state`).textContent = `${statusText(status)} ${wanted.model}, guidance ${wanted.guidance_scale}, ${wanted.steps} steps of ${wanted.solver}`;
        showImages(byId(name), status, wanted.prompt);
      }), { wanted });
    });
    busy(form, byId("compare-cancel"), watches, async () => {
      for (const status of await Promise.all(watches.map((watch) => watch.run(watch.wanted)))) {
        if (status.state === "failed") say(status.error);
        if (status.state === "done") addToGallery(status, watches[0].wanted.prompt);
      }
    });
  };
}

function startRun(about) {
  if (!about.runs.length) return;
  document.querySelector("[data-tab=run]").hidden = false;
  byId("run-name").replaceChildren(...choice(about.runs).children);
  const load = () => (byId("run-page").src = `api/runs/${encodeURIComponent(byId("run-name").value)}`);
  byId("run-name").onchange = byId("run-reload").onclick = load;
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
      const file = inputs.file.files[0], wanted = { chip: inputs.chip.value };
      for (const name of ["count", "price", "mfu", "images", "dollars"]) wanted[name] = inputs[name].value === "" ? null : Number(inputs[name].value);
      if (file) wanted.text = await file.text();
      else wanted.recipe = inputs.recipe.value;
      byId("estimate").textContent = (await request("POST", "api/budget", wanted)).text;
    } catch (error) {
      byId("estimate").textContent = "";
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
    const about = await request("GET", "api/about");
    for (const begin of [startDraw, startCompare, startRun, startBudget]) begin(about);
  } catch (error) {
    say(error.message);
  }
}

start();
