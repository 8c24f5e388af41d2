"use strict";

const $ = (id) => document.getElementById(id);
const jobs = new Map(); // id -> the job's JSON, the oldest first
let model = null;
let current = null; // id on the stage
let watching = null; // AbortController of the frame stream
let frames = []; // pictures of the current job, as they arrive
let videoUrl = null;

// Requests

function headers() {
  const key = sessionStorage.getItem("key");
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function call(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, { ...options, headers: { ...options.headers, ...headers() } });
  } catch (problem) {
    if (problem.name === "AbortError") throw problem;
    throw new Error("The server can't be reached: check that it runs.");
  }
  if (answer.ok) return answer;
  if (answer.status === 401) $("key-box").hidden = false;
  let message = `the server answered with status ${answer.status}: try again.`;
  try {
    message = (await answer.json()).error.message;
  } catch { /* a proxy may answer with something else */ }
  throw new Error(message[0].toUpperCase() + message.slice(1));
}

function showError(problem) {
  if (problem && problem.name === "AbortError") return;
  $("error").textContent = problem ? problem.message : "";
}

const guarded = (work) => async (...args) => {
  showError(null);
  try {
    await work(...args);
  } catch (problem) {
    showError(problem);
  }
};

// The form

$("guidance").addEventListener("change", () => {
  $("strength-box").hidden = $("guidance").value !== "number";
});

$("key").addEventListener("change", guarded(async () => {
  sessionStorage.setItem("key", $("key").value);
  await start();
}));

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});

const submit = guarded(async () => {
  const body = new FormData();
  body.append("prompt", $("prompt").value);
  if ($("seconds").value) body.append("seconds", $("seconds").value);
  if ($("seed").value) body.append("seed", $("seed").value);
  const guidance = $("guidance").value;
  body.append("guidance", guidance === "number" ? $("strength").value : guidance);
  const file = $("reference").files[0];
  if (file) {
    if (model && file.size > model.limits.max_upload_bytes) {
      throw new Error(`The file is too large: choose one of at most ${model.limits.max_upload_bytes} bytes.`);
    }
    body.append("input_reference", file);
  }
  $("make").disabled = true;
  try {
    const job = await (await call("/v1/videos", { method: "POST", body })).json();
    remember(job);
    show(job.id);
  } finally {
    $("make").disabled = false;
  }
});

// The stage

function show(id) {
  if (watching) watching.abort();
  watching = new AbortController();
  current = id;
  frames = [];
  if (videoUrl) URL.revokeObjectURL(videoUrl);
  videoUrl = null;
  for (const name of ["growing", "finished", "download", "cancel", "progress"]) $(name).hidden = true;
  $("finished").removeAttribute("src");
  $("empty").hidden = false;
  paint(jobs.get(id));
  watch(id, watching.signal).catch((problem) => {
    if (current === id) showError(problem);
  });
}

async function watch(id, signal) {
  if (jobs.get(id).status === "completed") return finish(id, signal);
  const answer = await call(`/v1/videos/${id}/frames`, { signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    text += value;
    const events = text.split("\n\n");
    text = events.pop();
    for (const event of events) await take(id, event, signal);
  }
  if (!ended(jobs.get(id))) throw new Error("The connection to the server broke: reload the page.");
}

async function take(id, event, signal) {
  const lines = Object.fromEntries(event.split("\n").map((line) => line.split(/: (.*)/s)));
  if (!lines.data || current !== id) return;
  const data = JSON.parse(lines.data);
  if (lines.event === "frame") {
    const picture = new Image();
    picture.src = data.image;
    await picture.decode();
    frames[data.index] = picture;
    $("growing").dataset.frames = frames.length;
    $("growing").hidden = false;
    $("empty").hidden = true;
    return;
  }
  remember(data);
  paint(data);
  if (lines.event === "end" && data.status === "completed") await finish(id, signal);
}

async function finish(id, signal) {
  const blob = await (await call(`/v1/videos/${id}/content`, { signal })).blob();
  if (current !== id) return;
  videoUrl = URL.createObjectURL(blob);
  $("finished").src = videoUrl;
  $("finished").hidden = false;
  $("growing").hidden = true;
  $("empty").hidden = true;
  $("download").href = videoUrl;
  $("download").download = `${id}.mp4`;
  $("download").hidden = false;
  frames = [];
}

const ended = (job) => !["queued", "in_progress"].includes(job.status);

function words(job) {
  if (job.status === "queued") {
    return job.queue_position ? `waiting behind ${job.queue_position} others` : "next in the queue";
  }
  if (job.status === "in_progress") return `frame ${job.frames_done} of ${job.num_frames}`;
  if (job.status === "failed") return job.error.message;
  return job.status;
}

function paint(job) {
  if (job.id !== current) return;
  $("status").textContent = words(job);
  $("progress").hidden = ended(job);
  $("progress").value = job.progress;
  $("cancel").hidden = ended(job);
  if (job.status === "failed") showError(new Error(job.error.message[0].toUpperCase() + job.error.message.slice(1)));
}

$("cancel").addEventListener("click", guarded(async () => {
  const id = current;
  await call(`/v1/videos/${id}`, { method: "DELETE" });
  const job = { ...jobs.get(id), status: "cancelled" };
  remember(job);
  paint(job);
}));

// what is there is played over and over while the rest is made
let shown = 0;
let last = 0;
function play(now) {
  requestAnimationFrame(play);
  const pictures = frames.filter(Boolean);
  const job = jobs.get(current);
  if (!pictures.length || !job || now - last < 1000 / job.fps) return;
  last = now;
  shown = shown + 1 < pictures.length ? shown + 1 : 0;
  const canvas = $("growing");
  const picture = pictures[shown];
  if (canvas.width !== picture.naturalWidth || canvas.height !== picture.naturalHeight) {
    canvas.width = picture.naturalWidth;
    canvas.height = picture.naturalHeight;
  }
  canvas.getContext("2d").drawImage(picture, 0, 0);
}
requestAnimationFrame(play);

// History

function remember(job) {
  jobs.set(job.id, job);
  sessionStorage.setItem("videos", JSON.stringify([...jobs.keys()]));
  list();
}

function list() {
  $("history").replaceChildren(...[...jobs.values()].reverse().map((job) => {
    const row = document.createElement("li");
    const what = document.createElement("span");
    what.className = "what";
    what.textContent = job.prompt;
    const details = document.createElement("small");
    const size = job.size.replace("x", "\u00d7");
    details.textContent = `${job.status.replace("_", " ")} \u00b7 ${job.seconds} s \u00b7 ${size} \u00b7 seed ${job.seed}`;
    what.append(details);
    row.append(what);
    if (job.status !== "cancelled" && job.status !== "failed") row.append(button("Show", job, () => show(job.id)));
    if (ended(job)) row.append(button("Delete", job, guarded(() => forget(job))));
    return row;
  }));
}

function button(text, job, action) {
  const element = document.createElement("button");
  element.type = "button";
  element.className = "quiet";
  element.textContent = text;
  element.setAttribute("aria-label", `${text}: ${job.prompt}`);
  element.addEventListener("click", action);
  return element;
}

async function forget(job) {
  if (job.status !== "cancelled") await call(`/v1/videos/${job.id}`, { method: "DELETE" }).catch(() => {});
  jobs.delete(job.id);
  sessionStorage.setItem("videos", JSON.stringify([...jobs.keys()]));
  list();
}

// Start

const start = guarded(async () => {
  model = (await (await call("/v1/models")).json()).data[0];
  $("model").textContent = `${model.id} \u00b7 ${model.size.replace("x", "\u00d7")} \u00b7 ${model.fps} frames a second`;
  $("seconds").placeholder = String(model.num_frames / model.fps);
  $("seconds").max = String(model.limits.max_num_frames / model.fps);
  for (const id of JSON.parse(sessionStorage.getItem("videos") || "[]")) {
    try {
      jobs.set(id, await (await call(`/v1/videos/${id}`)).json());
    } catch { /* the server keeps the newest only */ }
  }
  list();
  const newest = [...jobs.keys()].pop();
  if (newest && !current) show(newest);
});
start();
