"use strict";
// The page of `microdit prefer --vote`: it shows one pair of images after another and sends the votes.

const KEYS = { ArrowLeft: "first", ArrowRight: "second", " ": "tie" };
const byId = (id) => document.getElementById(id);
let question = null; // null while there is nothing to vote on

async function request(address, options) {
  let response;
  try {
    response = await fetch(address, { cache: "no-store", ...options });
  } catch {
    throw new Error("The server does not respond. Start it again and reload this page: no vote is lost.");
  }
  const content = await response.json();
  if (response.ok) return content;
  throw Object.assign(new Error(content.error.message), { status: response.status });
}

function say(sentence) {
  byId("note").textContent = sentence;
}

async function show(state) {
  if (state.question === undefined) {
    say(`${state.done} of ${state.total}.`);
    byId("prompt").textContent = "That was the last one. Thank you!";
    byId("images").hidden = byId("tie").hidden = true;
    return;
  }
  for (const side of ["first", "second"]) {
    const image = byId(side).firstElementChild;
    image.src = `api/images/${state.question}/${side}`;
    await image.decode().catch(() => {
      throw new Error(`The ${side} image of this pair cannot be loaded. Restore it and reload this page.`);
    });
  }
  byId("prompt").textContent = state.prompt;
  say(`${state.done} of ${state.total}. Which image follows the prompt better and looks better? Keys: left, right, space.`);
  question = state.question;
}

async function load() {
  await show(await request("api/state"));
}

async function vote(choice) {
  if (question === null) return;
  const voted = question;
  question = null;
  document.activeElement.blur();
  const body = JSON.stringify({ question: voted, choice });
  let state;
  try {
    state = await request("api/votes", { method: "POST", headers: { "Content-Type": "application/json" }, body });
  } catch (error) {
    if (error.status === 409) return load(); // somebody else has voted on this pair
    question = voted; // so that the vote can be repeated
    throw error;
  }
  await show(state);
}

const attempt = (work) => work().catch((error) => say(error.message));

for (const choice of ["first", "second", "tie"]) byId(choice).onclick = () => attempt(() => vote(choice));
addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.altKey || event.metaKey || !(event.key in KEYS)) return;
  if (event.key === " " && document.activeElement.matches("button")) return; // which the space bar presses
  event.preventDefault();
  attempt(() => vote(KEYS[event.key]));
});
attempt(load);
