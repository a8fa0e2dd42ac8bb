/* The playground: streams chat completions from the gateway and shows what happens while it waits.
   The key comes from the console, stays in this module's memory, and is asked for again when it has expired. */
import { events } from "./sse.js";

const root = document.getElementById("playground");
const byId = (id) => document.getElementById(id);

const STAGES = {
  waiting: "Waiting for a replica",
  queued: "Waiting in the queue",
  waking: "Waking the deployment",
  launching_machine: "Launching a machine",
  starting_machine: "Starting a stopped machine",
  waking_replica: "Waking a replica",
  starting_replica: "Starting a replica",
  loading_model: "Loading the model",
  ready: "Almost there",
  running: "Running",
};

const REDRAW_MS = 40; // tokens may come faster than a page can be laid out

const chat = { messages: [], key: null, abort: null };

if (root) start();

function start() {
  const prompt = byId("prompt");
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = prompt.value.trim();
    if (!text || chat.abort) return;
    prompt.value = "";
    fit(prompt);
    ask(text);
  });
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      byId("composer").requestSubmit();
    }
  });
  prompt.addEventListener("input", () => fit(prompt));
  byId("stop").addEventListener("click", () => chat.abort?.abort());
  byId("clear").addEventListener("click", clear);
  byId("temperature").addEventListener("input", (event) => {
    byId("temperature-value").textContent = Number(event.target.value).toFixed(1);
  });
  byId("deployment").addEventListener("change", () => { chat.key = null; });
  for (const button of document.querySelectorAll("[data-ask]")) {
    button.addEventListener("click", () => { if (!chat.abort) ask(button.dataset.ask); });
  }
  const narrow = window.matchMedia("(max-width: 860px)");
  const fold = () => { byId("knobs").open = !narrow.matches; };
  narrow.addEventListener("change", fold);
  fold();
}

function fit(area) {
  area.style.height = "auto"; // through the CSSOM, which the content security policy allows
  area.style.height = `${Math.min(area.scrollHeight, 200)}px`;
}

function clear() {
  chat.abort?.abort();
  chat.messages = [];
  for (const bubble of byId("thread").querySelectorAll(".bubble")) bubble.remove();
  byId("hello").hidden = false;
  byId("prompt").focus();
}

async function ask(text) {
  byId("hello").hidden = true;
  chat.messages.push({ role: "user", content: text });
  bubble("user").textContent = text;
  const answer = bubble("assistant");
  const run = { started: performance.now(), firstAt: null, n: 0, text: "", unseen: "", redraw: 0, usage: null, reason: "" };
  chat.abort = new AbortController();
  busy(true);
  stage("Sending");
  try {
    const response = await send(chat.abort.signal);
    for await (const event of events(response.body)) {
      if (event.comment) { told(event.comment); continue; }
      if (event.data === "[DONE]") break;
      take(JSON.parse(event.data), run, answer);
    }
    reveal(run, answer);
    if (!run.reason) throw new Failure("The stream ended early. What has arrived is above.");
    note(answer, summary(run));
  } catch (error) {
    reveal(run, answer);
    if (error.name === "AbortError") note(answer, `Stopped after ${run.n} token${run.n === 1 ? "" : "s"}`);
    else fail(answer, error);
  } finally {
    chat.abort = null;
    stage("");
    busy(false);
    show(run);
    // An answer that never came must not be part of the next question.
    if (run.text) chat.messages.push({ role: "assistant", content: run.text });
    else chat.messages.pop();
    byId("prompt").focus({ preventScroll: true });
  }
}

async function send(signal) {
  const choice = byId("deployment").selectedOptions[0];
  const system = byId("system").value.trim();
  const maxTokens = Number.parseInt(byId("max-tokens").value, 10);
  const body = JSON.stringify({
    model: choice.dataset.model,
    messages: system ? [{ role: "system", content: system }, ...chat.messages] : chat.messages,
    temperature: Number(byId("temperature").value),
    ...(maxTokens > 0 ? { max_tokens: maxTokens } : {}),
    stream: true,
    stream_options: { include_usage: true },
  });
  for (const last of [false, true]) {
    chat.key ??= await freshKey(choice.value, signal);
    let response;
    try {
      response = await fetch(`${root.dataset.baseUrl}/chat/completions`, {
        method: "POST",
        headers: { "Content-Type": "application/json", Authorization: `Bearer ${chat.key}` },
        body,
        signal,
        credentials: "omit",
      });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Failure(`The gateway at ${root.dataset.baseUrl} cannot be reached.`);
    }
    if (response.ok) return response;
    if (response.status === 401 && !last) { chat.key = null; continue; } // expired, or replaced by another tab
    throw await refusal(response);
  }
}

async function freshKey(deployment, signal) {
  const response = await fetch(root.dataset.keyUrl, {
    method: "POST",
    headers: { "X-CSRFToken": document.querySelector("[name=csrfmiddlewaretoken]").value },
    body: new URLSearchParams({ deployment }),
    signal,
  });
  if (response.redirected || !response.headers.get("Content-Type")?.startsWith("application/json")) {
    throw new Failure(response.ok ? "You are signed out. Reload the page." : "The console cannot make a key right now.");
  }
  if (!response.ok) throw await refusal(response);
  return (await response.json()).api_key;
}

class Failure extends Error {
  constructor(message, detail = "") {
    super(message);
    this.detail = detail;
  }
}

async function refusal(response) {
  const error = (await response.json().catch(() => ({}))).error ?? {};
  const wait = response.headers.get("Retry-After");
  const detail = [response.status, error.code, wait && `retry in ${wait} s`].filter(Boolean).join(" · ");
  return new Failure(error.message ?? `The gateway answered ${response.status}.`, detail);
}

function take(chunk, run, answer) {
  if (chunk.error) throw new Failure(chunk.error.message, chunk.error.code ?? "");
  const choice = chunk.choices?.[0];
  if (choice?.delta?.content) {
    if (run.firstAt === null) { run.firstAt = performance.now(); stage(""); }
    run.n += 1;
    run.lastAt = performance.now();
    run.text += choice.delta.content;
    run.unseen += choice.delta.content;
    run.redraw ||= setTimeout(reveal, REDRAW_MS, run, answer);
  }
  if (choice?.finish_reason) run.reason = chunk.corral?.finish ?? choice.finish_reason;
  if (chunk.usage) run.usage = chunk.usage;
}

function told(comment) {
  const found = /stage=(\w+)(?: eta_ms=(\d+))?/.exec(comment);
  if (!found) return;
  const eta = found[2] ? `, about ${seconds(Number(found[2]))}` : "";
  if (found[1] !== "running") stage((STAGES[found[1]] ?? found[1].replaceAll("_", " ")) + eta);
}

const ENDINGS = { stop: "", length: "reached max tokens", budget: "the budget is used up" };

function summary(run) {
  const figures = measure(run);
  const ending = ENDINGS[run.reason] ?? run.reason;
  return [`${figures.out} tokens`, `first after ${figures.ttft}`, figures.speed, ending].filter((part) => part && part !== "–").join(" · ");
}

/* Text of each figure; "–" where there is nothing to measure. */
function measure(run) {
  const nTokens = run.usage?.completion_tokens ?? run.n;
  const streamedMs = (run.lastAt ?? 0) - (run.firstAt ?? 0);
  return {
    ttft: run.firstAt === null ? "–" : seconds(run.firstAt - run.started),
    // Between the first and the last token: the wait before is a figure of its own.
    speed: streamedMs > 0 ? `${((nTokens - 1) * 1000 / streamedMs).toFixed(1)} tokens/s` : "–",
    in: String(run.usage?.prompt_tokens ?? "–"),
    out: String(nTokens || "–"),
    total: seconds(performance.now() - run.started),
  };
}

/* -- the page ------------------------------------------------------------------------------------------------ */

function bubble(role) {
  const item = document.createElement("article");
  item.className = `bubble ${role}`;
  item.setAttribute("aria-label", role === "user" ? "You" : "Answer");
  const text = document.createElement("div");
  text.className = "text";
  item.append(text);
  byId("thread").append(item);
  item.scrollIntoView({ block: "end" });
  return text;
}

/* Put what has come since the last time on the page: one layout for all of it. */
function reveal(run, answer) {
  clearTimeout(run.redraw);
  run.redraw = 0;
  if (!run.unseen) return;
  const thread = byId("thread");
  const atEnd = thread.scrollHeight - thread.scrollTop - thread.clientHeight < 60;
  answer.append(run.unseen);
  run.unseen = "";
  if (atEnd) thread.scrollTop = thread.scrollHeight;
  show(run);
}

function note(answer, text) {
  if (!text) return;
  const line = document.createElement("p");
  line.className = "after";
  line.textContent = text;
  answer.after(line);
}

function fail(answer, error) {
  const box = document.createElement("p");
  box.className = "note bad";
  box.setAttribute("role", "alert");
  box.textContent = error instanceof Failure ? error.message : "The answer could not be read.";
  if (error.detail) {
    const detail = document.createElement("code");
    detail.textContent = error.detail;
    box.append(" ", detail);
  }
  if (answer.textContent) answer.after(box);
  else answer.replaceWith(box);
  box.scrollIntoView({ block: "end" });
}

function stage(text) {
  byId("stage").textContent = text;
  byId("stage").classList.toggle("on", Boolean(text));
}

function busy(on) {
  byId("send").hidden = on;
  byId("stop").hidden = !on;
  root.classList.toggle("busy", on);
}

function show(run) {
  for (const [name, text] of Object.entries(measure(run))) byId(`stat-${name}`).textContent = text;
}

function seconds(ms) {
  return ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(ms < 10000 ? 2 : 1)} s`;
}
