"use strict";
// Both pages work without this script; it adds search, sorting and the large view.

const PER_PAGE = 50;
const $ = (id) => document.getElementById(id);

function cell(row, text, name) {
  const made = row.insertCell();
  made.className = name || "";
  made.textContent = text; // never as HTML: captions are anybody's
  return made;
}

function signed(score) {
  const text = Math.abs(score).toPrecision(3);
  return score === 0 ? "0" : (score > 0 ? "+" : "−") + text;
}

function startTable(data, show) {
  const rows = data.rows.map(([name, caption, score, other, group, kind], index) => (
    { rank: index + 1, name, caption, score, other, group, kind, text: `${name}\n${caption}`.toLowerCase() }));
  const collator = new Intl.Collator(undefined, { numeric: true });
  const body = document.querySelector("#table tbody");
  let shown = rows, key = "rank", falling = false, page = 0;

  function compare(one, other) {
    const a = one[key], b = other[key];
    if (a === null || b === null) return (a === null) - (b === null); // unknown ones last
    const order = typeof a === "string" ? collator.compare(a, b) : a - b;
    return (falling ? -order : order) || one.rank - other.rank;
  }

  function draw() {
    const last = Math.max(0, Math.ceil(shown.length / PER_PAGE) - 1);
    page = Math.min(page, last);
    body.replaceChildren();
    for (const item of shown.slice(page * PER_PAGE, (page + 1) * PER_PAGE)) {
      const row = body.insertRow();
      const rank = cell(row, "", "number");
      if (document.querySelector(`#image-${item.rank}`)) {
        const button = document.createElement("button");
        button.type = "button";
        button.textContent = item.rank;
        button.setAttribute("aria-label", `Number ${item.rank}: show the image`);
        button.onclick = () => show(item.rank);
        rank.append(button);
      } else rank.textContent = item.rank;
      cell(row, signed(item.score) + (item.kind & 2 ? " (estimate)" : ""), "number");
      const words = cell(row, item.caption);
      words.dir = "auto";
      if (item.kind & 1) {
        const tag = document.createElement("span");
        tag.className = "tag red";
        tag.textContent = "exemplar";
        words.append(" ", tag);
      }
      cell(row, item.name, "file").dir = "auto";
      if (data.comparison) cell(row, item.other === null ? "" : item.other.toLocaleString("en"), "number");
    }
    $("count").textContent = shown.length === rows.length ? `${rows.length.toLocaleString("en")} images`
      : `${shown.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")} images`;
    $("where").textContent = shown.length ? `page ${page + 1} of ${last + 1}` : "nothing found";
    $("back").disabled = page === 0;
    $("next").disabled = page === last;
  }

  function choose() {
    const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const group = $("group") ? $("group").value : "";
    shown = rows.filter((row) => (group === "" || row.group === +group) && words.every((word) => row.text.includes(word)));
    shown.sort(compare);
    page = 0;
    draw();
  }

  for (const button of document.querySelectorAll("#table th button")) {
    button.onclick = () => {
      falling = key === button.dataset.key ? !falling : button.dataset.key === "score";
      key = button.dataset.key;
      for (const header of document.querySelectorAll("#table th")) header.removeAttribute("aria-sort");
      button.closest("th").setAttribute("aria-sort", falling ? "descending" : "ascending");
      choose();
    };
  }
  data.groups.forEach((name, number) => $("group") && $("group").add(new Option(name, number)));
  $("search").oninput = choose;
  if ($("group")) $("group").onchange = choose;
  $("back").onclick = () => { page -= 1; draw(); };
  $("next").onclick = () => { page += 1; draw(); };
  document.querySelector(".tools").onsubmit = (event) => event.preventDefault();
  $("explorer").hidden = false;
  draw();
}

function startLarge() {
  const dialog = $("large");
  const ranks = [...document.querySelectorAll(".card")].map((card) => +card.id.slice(6)).sort((a, b) => a - b);
  const query = document.querySelector(".query .frame");
  let place = 0;

  function fill() {
    const rank = ranks[place], card = $(`image-${rank}`);
    const textOf = (part) => card.querySelector(part)?.textContent ?? "";
    $("large-title").textContent = `Number ${rank}`;
    $("large-query").replaceChildren(...[...query.children].map((node) => node.cloneNode(true)));
    $("large-image").replaceChildren(...[...card.querySelector(".frame").children].map((node) => node.cloneNode(true)));
    $("large-name").textContent = textOf(".name");
    $("large-caption").textContent = textOf(".caption");
    $("large-score").textContent = `score ${textOf(".score")}`;
    $("earlier").disabled = place === 0;
    $("later").disabled = place === ranks.length - 1;
  }

  function move(step) {
    place = Math.min(ranks.length - 1, Math.max(0, place + step));
    fill();
  }

  function show(rank) {
    place = ranks.indexOf(rank);
    fill();
    dialog.showModal();
  }

  for (const link of document.querySelectorAll("[data-rank]")) {
    link.addEventListener("click", (event) => {
      if (event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) return;
      event.preventDefault();
      show(+link.dataset.rank);
    });
  }
  $("close").onclick = () => dialog.close();
  $("earlier").onclick = () => move(-1);
  $("later").onclick = () => move(1);
  dialog.onclick = (event) => event.target === dialog && dialog.close();
  dialog.onkeydown = (event) => {
    if (event.key === "ArrowLeft") move(-1);
    if (event.key === "ArrowRight") move(1);
  };
  return show;
}

function startIndex() {
  const items = [...document.querySelectorAll(".queries li")];
  const texts = items.map((item) => item.querySelector(".words").textContent.toLowerCase());
  $("find").oninput = () => {
    const words = $("find").value.toLowerCase().split(/\s+/).filter(Boolean);
    items.forEach((item, index) => { item.hidden = !words.every((word) => texts[index].includes(word)); });
    $("found").textContent = `${items.filter((item) => !item.hidden).length} of ${items.length} queries`;
  };
  $("filter").onsubmit = (event) => event.preventDefault();
  $("filter").hidden = false;
}

if ($("data")) {
  const data = JSON.parse($("data").textContent);
  startTable(data, startLarge());
} else startIndex();
