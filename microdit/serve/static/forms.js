// Fields of the forms. Their values are checked by the server, whose errors the page shows.

import { make } from "./elements.js";

let fields = 0; // of the page, for their ids

function field(place, name, label, element, wide) {
  Object.assign(element, { name, id: `field-${++fields}` });
  const inside = name === "seed" ? make("span", { className: "dice" }, element, dice(element)) : element;
  const text = make("label", { htmlFor: element.id, textContent: label });
  place.append(make("div", { className: wide ? "field wide" : "field" }, text, inside));
}

function dice(input) {
  const button = make("button", { type: "button", textContent: "⚄", title: "Random seed" });
  button.setAttribute("aria-label", "Random seed");
  button.onclick = () => (input.value = Math.floor(Math.random() * 2 ** 31));
  return button;
}

const number = (value, more) => make("input", { type: "number", step: "any", value, ...more });

export const options = (values) => values.map((value) => make("option", { value, textContent: value }));
const choice = (values) => make("select", {}, ...options(values));

export function modelField(place, about) {
  const model = choice(Object.keys(about.models));
  field(place, "model", "Model", model, true);
  return model;
}

// The model, and settings that follow it.
export function settingsFields(place, about) {
  const model = modelField(place, about);
  const own = { guidance_scale: number(), steps: number(), solver: choice(about.solvers) };
  const suit = () => Object.entries(own).forEach(([name, input]) => (input.value = about.usual[model.value][name]));
  model.addEventListener("change", suit);
  suit();
  field(place, "guidance_scale", "Guidance", own.guidance_scale);
  field(place, "steps", "Steps", own.steps);
  field(place, "solver", "Solver", own.solver);
}

export function promptField(place) {
  field(place, "prompt", "Prompt", make("textarea", { rows: 2 }), true);
}

export function negativeField(place) {
  field(place, "negative_prompt", "Negative prompt", make("input"), true);
}

export function seedField(place) {
  field(place, "seed", "Seed", number(0));
}

export function imageFields(place, about) {
  seedField(place);
  field(place, "size", "Size", make("input", { value: Object.values(about.models)[0] }));
  field(place, "n", "Images", number(4, { min: 1, max: about.pictures }));
}

// Fill the form's examples with buttons that each write a prompt into it: prompts that suit the model that is chosen first in the form.
export function offerExamples(form, about) {
  const model = form.querySelector("[name=model]"), prompt = form.querySelector("[name=prompt]");
  const offer = (text) => make("button", { type: "button", textContent: text, onclick: () => (prompt.value = text) });
  const fill = () => {
    form.querySelector(".examples").replaceChildren(...about.examples[model.value].map(offer));
    prompt.placeholder = about.examples[model.value][0];
  };
  model.addEventListener("change", fill);
  fill();
}

const NUMBERS = ["guidance_scale", "steps", "seed", "n"];

// Return the fields in these places by their names; an empty number is null.
export function read(...places) {
  const values = {};
  for (const place of places) {
    for (const input of place.querySelectorAll("[name]")) {
      if (NUMBERS.includes(input.name)) values[input.name] = input.value === "" ? null : Number(input.value);
      else values[input.name] = input.value;
    }
  }
  return values;
}
