// The tabs Draw and Compare: jobs, their previews and their images.

import { announce, busy, byId, say } from "./elements.js";
import { imageFields, negativeField, offerExamples, promptField, read, settingsFields } from "./forms.js";
import { addToGallery, showImages, showOverlays } from "./pictures.js";
import { JobWatch } from "./requests.js";

function statusText(status) {
  return [stateText(status), ...(status.warnings ?? [])].join(" ");
}

function stateText(status) {
  if (status.state === "waiting") return status.place ? `Waiting behind ${status.place} ${status.place === 1 ? "job" : "jobs"}.` : "Waiting.";
  if (status.state === "running") return `Generating: ${Math.floor((100 * status.done) / status.all)}%`;
  return { done: "Done.", cancelled: "Cancelled.", failed: "Failed." }[status.state];
}

// Run a job for each of `watches`, with their `wanted` fields; show how they end, and keep their images.
function generate(form, watches) {
  const cancel = () => Promise.all(watches.map((watch) => watch.cancel()));
  return busy(form, cancel, async () => {
    announce("Generating.");
    const ended = await Promise.all(watches.map((watch) => watch.run(watch.wanted)));
    ended.forEach((status, i) => {
      if (status.state === "failed") say(status.error);
      if (status.state === "done") addToGallery(status, watches[i].wanted.prompt);
    });
    announce(ended.map((status, i) => spoken(status, watches[i].wanted.prompt)).join(" "));
  });
}

function spoken(status, prompt) {
  return status.state === "done" ? `Done: ${status.pictures.length} of ${prompt || "the empty prompt"}.` : statusText(status);
}

export function startDraw(about) {
  const form = byId("draw-form"), [prompts, settings] = form.querySelectorAll(".fields");
  const tell = (sentence) => (byId("state").textContent = sentence);
  promptField(prompts);
  negativeField(settings);
  settingsFields(settings, about);
  imageFields(settings, about);
  offerExamples(form, about);
  form.onsubmit = (event) => {
    event.preventDefault();
    const wanted = read(form);
    const show = (status) => {
      byId("progress").value = status.done / status.all;
      tell(statusText(status));
      showImages(byId("result"), status, wanted.prompt);
    };
    generate(form, [Object.assign(new JobWatch(show, tell), { wanted })]);
  };
}

export function startCompare(about) {
  const form = byId("compare-form"), shared = form.querySelector(".shared"), sides = [...form.querySelectorAll(".fields")];
  sides.forEach((side) => settingsFields(side, about));
  differ(sides[1], about);
  promptField(shared);
  negativeField(shared);
  imageFields(shared, about);
  offerExamples(form, about);
  byId("compare-view").onchange = (event) => {
    byId("side-by-side").hidden = event.target.value !== "sides";
    byId("overlays").hidden = event.target.value !== "slider";
  };
  form.onsubmit = (event) => {
    event.preventDefault();
    const shown = {}; // the last status of either side that has images
    const watches = ["left", "right"].map((name, i) => {
      const wanted = read(shared, sides[i]);
      const tell = (sentence) => {
        byId(`${name}-state`).textContent = `${sentence} ${wanted.model}, guidance ${wanted.guidance_scale}, ${wanted.steps} steps of ${wanted.solver}`;
      };
      const show = (status) => {
        tell(statusText(status));
        showImages(byId(name), status, wanted.prompt);
        if (status.pictures || status.state === "cancelled") shown[name] = status;
        showOverlays(byId("overlays"), shown.left, shown.right, wanted.prompt);
      };
      return Object.assign(new JobWatch(show, tell), { wanted });
    });
    generate(form, watches);
  };
}

// Let the right side begin with another model, or, if there is only one, with more guidance.
function differ(side, about) {
  const models = Object.keys(about.models);
  if (models.length > 1) {
    const model = side.querySelector("[name=model]");
    model.value = models[1];
    model.dispatchEvent(new Event("change"));
  } else side.querySelector("[name=guidance_scale]").value = 2 * about.usual[models[0]].guidance_scale;
}
