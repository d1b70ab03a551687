// The page: asks for the state once a second and lays it out. Whatever has a name in it is text, never markup.
"use strict";

const EVERY_MS = 1000;
const COLOURS = 8;
const MOST_EVENTS = 100;
const STATES = { MODEL_STATE_LOADING: "loading", MODEL_STATE_READY: "ready", MODEL_STATE_UNAVAILABLE: "unavailable",
  MODEL_STATE_UNLOADING: "unloading", MODEL_STATE_RECOVERING: "recovering" };
const BAD = new Set(["load-failed", "refused", "stages-lost", "unavailable"]);
const GOOD = new Set(["load-ready", "recovered", "found"]);

// 64-bit numbers come as text.
const number = (value) => Number(value || 0);

function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name === "class") made.className = value;
    else if (name === "part") made.style.flexBasis = `${(100 * value).toFixed(3)}%`;
    else made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function size(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let value = bytes;
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) { value /= 1024; unit += 1; }
  return unit ? `${value < 10 ? value.toFixed(2) : value < 100 ? value.toFixed(1) : Math.round(value)} ${units[unit]}` : `${bytes} B`;
}

function rate(bytes) {
  const units = ["B/s", "kB/s", "MB/s", "GB/s"];
  let value = bytes;
  let unit = 0;
  while (value >= 1000 && unit < units.length - 1) { value /= 1000; unit += 1; }
  return `${value < 10 && unit ? value.toFixed(1) : Math.round(value)} ${units[unit]}`;
}

function duration(seconds) {
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
}

const count = (value, one) => `${value.toLocaleString("en")} ${one}${value === 1 ? "" : "s"}`;
const tokens = (value) => (value >= 100 || value === 0 ? Math.round(value).toLocaleString("en") : value.toFixed(1));

// A model keeps its colour while the page is open, whoever comes and goes.
const colours = new Map();
function colour(name) {
  if (!colours.has(name)) {
    const taken = [...colours.values()];
    let best = 0;
    for (let each = 0; each < COLOURS; each += 1) {
      const used = (which) => taken.filter((one) => one === which).length;
      if (used(each) < used(best)) best = each;
    }
    colours.set(name, best);
  }
  return `c${colours.get(name)}`;
}

function fact(title, value, more) {
  return element("div", {}, element("dt", {}, title), element("dd", {}, value, more ? element("small", {}, ` ${more}`) : null));
}

function stageOf(model, stage, state) {
  const row = element("li", {},
    element("span", {}, `stage ${stage.index}`),
    element("span", {}, `${stage.node}/${stage.device} `,
      element("span", { class: "layers" }, `layers ${stage.first_layer}–${stage.last_layer}`)),
    element("span", { class: "bytes" }, size(number(stage.resident_bytes))));
  const progress = stage.progress;
  if (state === "loading") {
    const all = progress ? progress.tensors : 0;
    const done = progress ? progress.tensors_loaded : 0;
    row.append(element("progress", { max: all || 1, value: done, "aria-label": `stage ${stage.index} of ${model.name}, loading` }));
    let text = "waiting for its worker";
    if (progress) {
      text = `${size(number(progress.fetched_bytes))} of ${size(number(progress.fetch_bytes))} ${progress.cached ? "from the cache" : "fetched"}`;
      if (progress.done) text += ", resident";
      else if (progress.bytes_per_second) text += ` at ${rate(progress.bytes_per_second)}`;
      if (!progress.done && progress.seconds_left) text += `, ${duration(progress.seconds_left)} left`;
    }
    row.append(element("span", { class: "left" }, text));
  } else if (!stage.answers) {
    row.append(element("span", { class: "left" }, "doesn't answer"));
  }
  return row;
}

function modelCard(model) {
  const state = STATES[model.state] || "unknown";
  const stages = model.stages;
  const resident = stages.reduce((sum, stage) => sum + number(stage.resident_bytes), 0);
  const card = element("article", { class: `model ${colour(model.name)}`, "data-model": model.name },
    element("h3", {}, element("span", { class: "name" }, model.name), element("span", { class: `state ${state}` }, state)),
    element("p", { class: "what" }, model.path,
      model.quantization && model.quantization !== "none" ? `, ${model.quantization}` : "",
      stages.length ? `, ${count(stages.length, "stage")}, ${size(resident)}` : ""));
  if (model.reason) card.append(element("p", { class: "reason" }, model.reason));
  const facts = element("dl", { class: "facts" });
  if (state === "loading") {
    facts.append(fact("loading for", duration(model.load_seconds)));
  } else {
    facts.append(
      fact("tokens/s", tokens(model.tokens_per_second)),
      fact("sessions", String(model.sessions_running), model.max_sessions ? `of ${model.max_sessions}` : ""),
      fact("waiting", String(model.sessions_waiting)),
      fact("of room kept", number(model.kv_tokens) ? `${Math.round((100 * number(model.reserved_tokens)) / number(model.kv_tokens))} %` : "–"),
      fact(model.recoveries === 1 ? "recovery" : "recoveries", String(model.recoveries), model.recoveries ? `${duration(model.recovery_seconds)}` : ""));
    facts.lastChild.title = model.recoveries ? "how long the last one took stands beside it" : "";
    facts.children[3].title = `${number(model.reserved_tokens).toLocaleString("en")} of ${number(model.kv_tokens).toLocaleString("en")} tokens are promised to sessions`;
  }
  card.append(facts, element("ol", { class: "stages" }, ...stages.map((stage) => stageOf(model, stage, state))));
  return card;
}

// Stages that lie on a device: on a node's memory all of its CPU workers'.
function stagesOn(view, node, device) {
  const kind = device.device === "cpu" ? (name) => name.startsWith("cpu") : (name) => name === device.device;
  const found = [];
  for (const model of view.models) {
    for (const stage of model.stages) {
      if (stage.node === node.node && kind(stage.device)) found.push({ model, stage });
    }
  }
  return found;
}

function deviceRow(view, node, device) {
  const total = number(device.total_bytes);
  const free = Math.min(total, number(device.free_bytes));
  const own = stagesOn(view, node, device);
  const bar = element("div", { class: "bar", role: "img" });
  const parts = element("ul", { class: "parts" });
  let used = 0;
  const described = [];
  for (const { model, stage } of own) {
    const weights = number(stage.resident_bytes);
    const kv = number(stage.kv_bytes);
    const budget = Math.max(number(stage.kv_budget_bytes), kv);
    used += weights + budget;
    const label = `${model.name} stage ${stage.index}`;
    const named = (what, bytes) => what === "weights" && bytes / total > 0.1;
    const part = (bytes, kind, text) => {
      if (bytes > 0 && total > 0) bar.append(element("span", { class: `${kind} ${colour(model.name)}${named(kind, bytes) ? " named" : ""}`, part: Math.min(1, bytes / total), title: `${label}: ${text}` }, named(kind, bytes) ? model.name : ""));
    };
    part(weights, "weights", `${size(weights)} of weights`);
    part(kv, "kv", `${size(kv)} of keys and values`);
    part(budget - kv, "room", `${size(budget - kv)} more for keys and values`);
    const text = `${size(weights)} weights, ${size(kv)} of ${size(budget)} keys and values`;
    described.push(`${label}: ${text}`);
    parts.append(element("li", { class: colour(model.name) }, element("span", { class: "chip", "aria-hidden": "true" }),
      element("b", {}, label), element("span", {}, text),
      stage.sessions ? element("span", {}, count(stage.sessions, "session")) : null));
  }
  const others = Math.max(0, total - free - used);
  if (others / total > 0.002) {
    bar.append(element("span", { class: "other", part: others / total, title: `${size(others)} of others` }));
    described.push(`others: ${size(others)}`);
  }
  const left = Math.max(0, Math.min(free, total - used));
  bar.setAttribute("aria-label", [...described, `${size(left)} of ${size(total)} free`].join("; "));
  const kind = device.device === "cpu" ? "memory" : device.device;
  return element("div", { class: "device", "data-device": `${node.node}/${device.device}` },
    element("div", { class: "head" },
      element("span", { class: "kind" }, kind, device.name ? element("small", {}, ` ${device.name}`) : null),
      element("span", { class: "sum" }, `${size(left)} of ${size(total)} free`)),
    bar, parts);
}

function nodeCard(view, node) {
  const card = element("article", { class: node.alive ? "node" : "node dead", "data-node": node.node },
    element("h3", {}, element("span", { class: "name" }, node.node),
      node.is_head ? element("span", { class: "role" }, "head") : null,
      node.alive ? null : element("span", { class: "state gone" }, "gone")));
  card.append(...node.devices.map((device) => deviceRow(view, node, device)));
  if (node.alive && !node.devices.length) card.append(element("p", { class: "what" }, "takes no stages"));
  return card;
}

function eventRow(event) {
  const when = new Date(event.unix_s * 1000);
  const kind = BAD.has(event.kind) ? "bad" : GOOD.has(event.kind) ? "good" : "";
  const times = event.count > 1 ? ` (${event.count} times)` : "";
  return element("li", { class: kind },
    element("time", { datetime: when.toISOString(), title: when.toLocaleString() }, when.toLocaleTimeString([], { hour12: false })),
    element("span", { class: "kind" }, event.kind.replaceAll("-", " ")),
    element("span", { class: "of" }, event.model),
    element("span", { class: "text" }, event.text + times));
}

function empty(text, command) {
  return element("p", { class: "empty" }, text, command ? element("code", {}, command) : null);
}

function totals(view) {
  const ready = view.models.filter((model) => model.state === "MODEL_STATE_READY").length;
  const sum = (key) => view.models.reduce((all, model) => all + number(model[key]), 0);
  const alive = view.nodes.filter((node) => node.alive);
  const entries = [["nodes", String(alive.length)], ["models ready", `${ready} of ${view.models.length}`],
    ["sessions", String(sum("sessions_running"))], ["waiting", String(sum("sessions_waiting"))],
    ["tokens/s", tokens(sum("tokens_per_second"))]];
  return entries.map(([title, value]) => element("div", {}, element("dt", {}, title), element("dd", {}, value)));
}

// Only what has changed is replaced: a selection, a place in a list, and a reader's attention stay.
const shown = new Map();
function put(id, key, make) {
  const text = JSON.stringify(key);
  if (shown.get(id) === text) return;
  shown.set(id, text);
  document.getElementById(id).replaceChildren(...make());
}

function show(view) {
  for (const model of view.models) colour(model.name);
  put("totals", [view.models, view.nodes.length], () => totals(view));
  put("models", view.models, () => (view.models.length ? view.models.map(modelCard)
    : [empty("No model is loaded: ", "shardlift load org/name")]));
  put("nodes", [view.nodes, view.models.map((model) => [model.name, model.stages])], () => (view.nodes.length
    ? [...view.nodes].sort((a, b) => (b.devices.length > 0) - (a.devices.length > 0)).map((node) => nodeCard(view, node)) : [empty("Ray's nodes aren't known yet.")]));
  const latest = view.events.slice(-MOST_EVENTS).reverse();
  put("events", latest, () => (latest.length ? latest.map(eventRow)
    : [element("li", { class: "empty" }, "Nothing has happened since the gateway was started.")]));
  document.title = view.models.some((model) => model.state !== "MODEL_STATE_READY") ? "● shardlift" : "shardlift";
}

function say(kind, text) {
  const status = document.getElementById("status");
  status.className = `status ${kind}`;
  const line = document.getElementById("status-text");
  if (line.textContent !== text) line.textContent = text;
}

async function look() {
  try {
    const answer = await fetch("state", { cache: "no-store", signal: AbortSignal.timeout(15000) });
    if (answer.status === 401) { location.assign("login"); return; }
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    show(await answer.json());
    say("live", "live");
  } catch (error) {
    say("lost", "the gateway doesn't answer; trying again");
  }
  setTimeout(begin, EVERY_MS);
}

// Nobody looks at a hidden page: nothing is asked for.
function begin() {
  if (!document.hidden) { look(); return; }
  document.addEventListener("visibilitychange", begin, { once: true });
}
begin();
