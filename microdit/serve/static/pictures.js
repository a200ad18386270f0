// Images of jobs: results, the gallery, and two results over one another with a slider. Elements are kept from one preview to the next.

import { byId, make } from "./elements.js";

const GALLERY = 200; // images that the page keeps

const described = (prompt, seed) => `${prompt || "empty prompt"}, seed ${seed}`;
const captionOf = (prompt, seed) => `${seed} · ${prompt || "empty prompt"}`;

function figure() {
  return make("figure", {}, make("img"), make("figcaption"));
}

function fillFigure(place, address, prompt, seed) {
  const [image, caption] = place.children;
  Object.assign(image, { src: address, alt: described(prompt, seed) });
  place.title = described(prompt, seed);
  caption.textContent = captionOf(prompt, seed);
}

// Make `place` hold as many children as there are images, made by `create`.
function fit(place, count, create) {
  while (place.children.length > count) place.lastChild.remove();
  while (place.children.length < count) place.append(create());
}

// Show the images of a status in `place`; a status without any leaves the last ones, unless the job was cancelled.
export function showImages(place, status, prompt) {
  if (status.state === "cancelled") place.replaceChildren();
  if (!status.pictures) return;
  place.classList.toggle("unfinished", status.state !== "done");
  fit(place, status.pictures.length, figure);
  status.pictures.forEach((address, i) => fillFigure(place.children[i], address, prompt, status.seed + i));
}

export function addToGallery(status, prompt) {
  const gallery = byId("gallery"), figures = status.pictures.map(figure);
  figures.forEach((place, i) => fillFigure(place, status.pictures[i], prompt, status.seed + i));
  gallery.querySelector("p")?.remove();
  gallery.prepend(...figures);
  while (gallery.children.length > GALLERY) gallery.lastChild.remove();
}

// A figure with the right image over the left one; a slider says where the left one ends.
function overlay() {
  const slider = make("input", { type: "range", min: 0, max: 100, value: 50 });
  const images = make("div", { className: "overlay" }, make("img"), make("img"), slider, make("span"));
  const split = () => {
    images.style.setProperty("--split", `${slider.value}%`);
    slider.setAttribute("aria-valuetext", `left ${slider.value}%, right ${100 - slider.value}%`);
  };
  slider.addEventListener("input", split);
  split();
  return make("figure", {}, images, make("figcaption"));
}

// Show the images of two statuses over one another, as far as both have any.
export function showOverlays(place, left, right, prompt) {
  const count = Math.min(left?.pictures?.length ?? 0, right?.pictures?.length ?? 0);
  fit(place, count, overlay);
  [...place.children].forEach((figure, i) => {
    const [images, caption] = figure.children, seed = left.seed + i;
    const [under, over, slider] = images.children;
    Object.assign(under, { src: left.pictures[i], alt: `left: ${described(prompt, seed)}` });
    Object.assign(over, { src: right.pictures[i], alt: `right: ${described(prompt, seed)}` });
    slider.setAttribute("aria-label", `Left and right result of ${described(prompt, seed)}`);
    caption.textContent = captionOf(prompt, seed);
  });
}
