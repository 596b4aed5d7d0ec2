// SPDX-License-Identifier: Apache-2.0
// The page of `vtclip serve`. Every text is set by textContent, and nothing comes from elsewhere.
"use strict";

const GROUP = 8; // images of one request, so that progress is seen
const TRIES = 6; // of a request that finds the service busy
const at = (id) => document.getElementById(id);
let about = null;

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

const percent = (share) => `${(100 * share).toFixed(1)} %`;
const count = (n, one) => `${n} ${one}${n === 1 ? "" : "s"}`;
const wait = (seconds) => new Promise((done) => setTimeout(done, 1000 * seconds));

function complain(line) {
  at("errors").append(make("li", "", line));
}

/* Sends files as a form; again where the service is busy. The Response, or an Error in one line. */
async function send(path, files) {
  for (let attempt = 1; ; attempt++) {
    const form = new FormData();
    for (const file of files) form.append("images", file, file.name);
    let answer;
    try {
      answer = await fetch(path, { method: "POST", body: form });
    } catch {
      throw new Error("the service does not answer");
    }
    if (answer.ok) return answer;
    if (answer.status === 503 && attempt < TRIES) {
      await wait(Number(answer.headers.get("Retry-After")) || 1);
      continue;
    }
    let line = `status ${answer.status}`;
    try {
      line = (await answer.json()).error;
    } catch { /* no JSON: the status says it */ }
    throw new Error(line);
  }
}

/* Files in groups that one request may hold; what is too large by itself is named and left out. */
function grouped(files, most) {
  const groups = [];
  let bytes = 0;
  for (const file of files) {
    const size = file.size + 1024;
    if (size > about.max_upload) {
      complain(`${file.name}: larger than ${Math.floor(about.max_upload / 1048576)} MB, the limit`);
      continue;
    }
    const last = groups[groups.length - 1];
    if (!last || last.length >= Math.min(most, about.max_images) || bytes + size > about.max_upload) {
      groups.push([file]);
      bytes = size;
    } else {
      last.push(file);
      bytes += size;
    }
  }
  return groups;
}

function bars(predictions) {
  const list = make("ol");
  for (const one of predictions) {
    const row = make("li", "bar");
    const track = make("div", "track");
    const fill = make("div", "fill");
    fill.style.width = percent(one.probability).replace(" ", "");
    track.append(fill);
    row.append(make("span", "label", one.label), make("span", "percent", percent(one.probability)), track);
    list.append(row);
  }
  return list;
}

function picture(source, alt, className, failed) {
  const image = make("img", className);
  image.alt = alt;
  image.loading = "lazy";
  image.addEventListener("error", () => {
    const none = make("div", `${className} none`, failed);
    image.replaceWith(none);
  });
  image.src = source;
  return image;
}

function card(file, entry) {
  const item = make("li", "card");
  const top = make("div", "top");
  const url = URL.createObjectURL(file);
  const thumb = picture(url, `Preview of ${file.name}`, "thumb", "no preview");
  thumb.addEventListener("load", () => URL.revokeObjectURL(url));
  thumb.loading = "eager";
  const text = make("div");
  text.append(make("p", "file", file.name));
  if (entry.error) {
    text.append(make("p", "error", entry.error));
    top.append(thumb, text);
    item.append(top);
    return item;
  }
  const best = entry.predictions[0];
  if (entry.unknown) {
    const unknown = make("p", "unknown");
    unknown.append(make("strong", "", "unknown"));
    unknown.append(`like no class (p = ${entry.p_value.toFixed(3)}); nearest: ${best.label}`);
    text.append(unknown);
  } else {
    text.append(make("h3", "verdict", best.label));
  }
  text.append(bars(entry.predictions));
  if (entry.set) {
    const names = entry.set.length ? entry.set.join(", ") : "no class";
    text.append(make("p", "file", `Set of ${Math.round(100 * about.coverage)} % coverage: ${names}`));
  }
  top.append(thumb, text);
  item.append(top);
  if (about.explain) item.append(...explanation(file, best.label));
  return item;
}

function explanation(file, label) {
  const heat = about.explain === "heat map";
  const button = make("button", "more", heat ? "Where it looks" : "Why this class");
  const panel = make("div", "why");
  button.type = "button";
  panel.hidden = true;
  button.setAttribute("aria-expanded", "false");
  button.setAttribute("aria-label", `${button.textContent}: ${label}, ${file.name}`);
  let filled = false;
  button.addEventListener("click", async () => {
    panel.hidden = !panel.hidden;
    button.setAttribute("aria-expanded", String(!panel.hidden));
    if (filled || panel.hidden) return;
    filled = true;
    const line = make("p", "soft", "Working…");
    line.setAttribute("role", "status");
    panel.replaceChildren(line);
    try {
      const answer = await send(`/api/explain?top=3&class=${encodeURIComponent(label)}`, [file]);
      panel.replaceChildren(...explained(await answer.json()));
    } catch (error) {
      filled = false;
      line.className = "error";
      line.textContent = error.message;
    }
  });
  return [button, panel];
}

function explained(why) {
  const parts = [];
  if (why.heat_map) {
    parts.push(make("h4", "", `Where ${why.label} looks`));
    const source = `data:image/png;base64,${why.heat_map}`;
    parts.push(picture(source, `Heat map of ${why.label}: yellow where the attention is strongest`, "heat", "no heat map"));
  }
  if (!why.rows) return parts;
  const share = `${percent(why.probability)} against ${percent(why.other_probability)}`;
  parts.push(make("p", "", `${why.label} over ${why.other}: ${share}, log-odds ${signed(why.log_odds)}.`));
  for (const [title, rows] of [
    [`Speaks for ${why.label}`, why.rows.filter((row) => row.log_odds > 0)],
    [`Speaks for ${why.other}`, why.rows.filter((row) => row.log_odds < 0)],
  ]) {
    parts.push(make("h4", "", title));
    if (!rows.length) {
      parts.push(make("p", "soft", "no training image"));
      continue;
    }
    const list = make("ul", "rows");
    list.append(...rows.map(trainingRow));
    parts.push(list);
  }
  const reading = "Numbers: what an image adds to the log-odds. One that is less alike than usual speaks against its own class.";
  parts.push(make("p", "file note", reading));
  for (const note of why.notes) parts.push(make("p", "soft", note));
  return parts;
}

const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(2);

function trainingRow(row) {
  const item = make("li");
  if (row.training_image === null) {
    item.append(make("div", "none", row.kind === "prompts" ? "the words" : "no picture"));
  } else {
    const source = `/api/training-image/${row.training_image}`;
    item.append(picture(source, `Training image ${row.name}`, "", "the picture is gone"));
  }
  item.append(make("div", "", row.label), make("div", "soft", signed(row.log_odds)));
  return item;
}

function progress(bar, line, done, all, words) {
  bar.hidden = done >= all;
  bar.max = Math.max(1, all);
  bar.value = done;
  line.textContent = done < all ? `${done} of ${count(all, "image")}` : words;
}

async function classify(files) {
  if (!files.length || !about) return;
  at("errors").replaceChildren();
  const topk = Math.min(20, Math.max(1, Math.round(Number(at("topk").value)) || 5));
  const sets = about.coverage ? `&coverage=${about.coverage}` : "";
  let done = 0;
  let read = 0;
  for (const group of grouped(files, GROUP)) {
    progress(at("progress"), at("status"), done, files.length, "");
    try {
      const answer = await send(`/api/predict?topk=${topk}${sets}`, group);
      const { images } = await answer.json();
      images.forEach((entry, i) => at("results").append(card(group[i], entry)));
      read += images.filter((entry) => !entry.error).length;
    } catch (error) {
      complain(`${group.map((file) => file.name).join(", ")}: ${error.message}`);
    }
    done += group.length;
  }
  const rest = files.length - read;
  const words = count(read, "image") + " classified" + (rest ? `, ${rest} not` : "");
  progress(at("progress"), at("status"), 1, 1, words);
  at("clear").hidden = !at("results").children.length;
}

async function toTable(files) {
  if (!files.length || !about) return;
  at("errors").replaceChildren();
  at("csv").hidden = true;
  const lines = [];
  let done = 0;
  let rows = 0;
  for (const group of grouped(files, 2 * GROUP)) {
    progress(at("batch-progress"), at("batch-status"), done, files.length, "");
    try {
      const text = await (await send("/api/batch?topk=1", group)).text();
      const start = text.indexOf("\n") + 1; // the head of the table, which stands there once
      if (!lines.length) lines.push(text.slice(0, start));
      lines.push(text.slice(start));
      rows += group.length;
    } catch (error) {
      complain(`${group.map((file) => file.name).join(", ")}: ${error.message}`);
    }
    done += group.length;
  }
  const rest = files.length - rows;
  const words = `${count(rows, "image")} in the table` + (rest ? `, ${rest} not` : "");
  progress(at("batch-progress"), at("batch-status"), 1, 1, words);
  if (!lines.length) return;
  const link = at("csv");
  if (link.href) URL.revokeObjectURL(link.href);
  link.href = URL.createObjectURL(new Blob(lines, { type: "text/csv" }));
  link.hidden = false;
  link.focus();
}

/* One selection after the other, however fast they are made. */
let queue = Promise.resolve();
function chosen(input, work) {
  input.addEventListener("change", () => {
    const files = [...input.files];
    input.value = "";
    queue = queue.then(() => work(files));
  });
}

function takeDrops(area) {
  const over = (event) => {
    event.preventDefault();
    area.classList.toggle("over", event.type === "dragover");
  };
  for (const type of ["dragover", "dragleave", "drop"]) area.addEventListener(type, over);
  area.addEventListener("drop", (event) => {
    const files = [...event.dataTransfer.files];
    queue = queue.then(() => classify(files));
  });
  for (const type of ["dragover", "drop"]) {
    window.addEventListener(type, (event) => event.preventDefault()); // else the browser leaves
  }
}

async function start() {
  try {
    const [health, classes] = await Promise.all(
      ["/health", "/api/classes"].map(async (path) => (await fetch(path)).json()),
    );
    about = classes;
    at("title").textContent = health.run;
    document.title = `${health.run}: what is in an image`;
    const unknown = classes.unknown ? `; says “unknown” at a rate of ${percent(classes.unknown)}` : "";
    const kinds = health.classes === 1 ? "1 class" : `${health.classes} classes`;
    at("about").textContent =
      `${kinds}, method ${health.method}, model ${health.model}${unknown}.`;
    at("classes").append(...classes.classes.map((name) => make("li", "", name)));
  } catch {
    at("about").textContent = "";
    complain("the service does not answer; load the page again");
  }
}

chosen(at("files"), classify);
chosen(at("batch"), toTable);
takeDrops(at("drop"));
at("clear").addEventListener("click", () => {
  at("results").replaceChildren();
  at("errors").replaceChildren();
  at("status").textContent = "";
  at("clear").hidden = true;
  at("files").focus();
});
start();
