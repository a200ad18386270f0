// Elements of the page. What comes from outside becomes text or the value of an attribute, never HTML.

export const byId = (id) => document.getElementById(id);

export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// Show an error at the top of the page, or hide the last one with an empty sentence.
export function say(sentence) {
  byId("message").textContent = sentence;
  byId("message").hidden = !sentence;
}

// Let screen readers speak a sentence. Progress, which changes several times a second, is not announced.
export function announce(sentence) {
  byId("announcement").textContent = sentence;
}

// Run `work` with the form's button disabled and its cancel button calling `cancel`. Errors are shown, and cancel what is left of the work.
export async function busy(form, cancel, work) {
  const button = form.querySelector(".main"), stop = form.querySelector(".cancel");
  say("");
  button.disabled = true;
  stop.disabled = false;
  stop.onclick = () => cancel().catch((error) => say(error.message));
  try {
    await work();
  } catch (error) {
    say(error.message);
    await cancel().catch(() => {});
  } finally {
    button.disabled = false;
    stop.disabled = true;
  }
}
