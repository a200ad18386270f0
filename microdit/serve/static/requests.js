// Requests to the server that serves the page, with patience for one that does not respond for a while.

export const PATIENCE = { waits: [1, 2, 4, 8, 15, 30], answer: 60 }; // seconds between attempts, and until an attempt counts as failed
const POLL_SECONDS = 0.25;
const ENDED = ["done", "failed", "cancelled"];

export const sleep = (seconds) => new Promise((later) => setTimeout(later, 1000 * seconds));

// Return the JSON that the server responds with. Errors are sentences: `passing` if there is no response at all, `cancelled` by `signal`.
export async function request(method, address, { body, signal } = {}) {
  let response, content;
  try {
    response = await fetch(address, { method, signal, headers: { "Content-Type": "application/json" }, body: body && JSON.stringify(body) });
    content = await response.json().catch((error) => {
      if (response.ok) throw error; // cut off on its way
      return {};
    });
  } catch (error) {
    if (error.name === "AbortError") throw Object.assign(new Error("Cancelled."), { cancelled: true });
    throw Object.assign(new Error("The server does not respond: is microdit app still running?"), { passing: true });
  }
  if (response.ok) return content;
  throw new Error(content.error ? content.error.message : `The server responded with status ${response.status}.`);
}

// Return what the address responds with. While there is no response, try again for a minute, and `tell` about it.
export async function poll(address, tell) {
  for (const wait of [...PATIENCE.waits, null]) {
    try {
      return await request("GET", address, { signal: AbortSignal.timeout(1000 * PATIENCE.answer) });
    } catch (error) {
      if (!error.passing || wait === null) {
        tell("Given up.");
        throw error;
      }
      tell(`The server does not respond. Trying again in ${wait} ${wait === 1 ? "second" : "seconds"}.`);
      await sleep(wait);
    }
  }
}

// Follows one job: `show(status)` is called with each status that the server returns, `tell(sentence)` while it does not respond.
export class JobWatch {
  constructor(show, tell) {
    Object.assign(this, { show, tell, id: null });
  }

  // Return the last status of a new job.
  async run(fields) {
    this.id = (await request("POST", "api/jobs", { body: fields })).id;
    for (;;) {
      const start = performance.now();
      const status = await poll(`api/jobs/${this.id}`, this.tell);
      this.show(status);
      if (ENDED.includes(status.state)) return status;
      await sleep(Math.max(POLL_SECONDS, (performance.now() - start) / 1000)); // a preview takes at most half of the server's time
    }
  }

  async cancel() {
    if (this.id) await request("DELETE", `api/jobs/${this.id}`);
  }
}
