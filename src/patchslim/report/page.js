// Lets a reader filter, sort, point at and pin the rows of a report, and save its numbers.
//
// The page is whole without this script. It formats no number: what it shows of a row is read from
// the row's cells in the table, and what it saves is the data that the report was made from.
"use strict";

(() => {
  const find = (selector, root = document) => root.querySelector(selector);
  const findAll = (selector, root = document) => [...root.querySelectorAll(selector)];
  const table = find("#rows");
  const card = find("#card");
  const pins = find("#pins");
  const charts = findAll(".charts");
  const NEAR = 20; // in units of a chart: how far from a mark the pointer may be
  const MOST_PINS = 2;

  document.documentElement.classList.add("js");
  for (const part of findAll(".script")) part.hidden = false;

  // ---------------------------------------------------------------- rows

  // A baseline that two rows share stands in the table twice; its first row will do.
  const rows = new Map();
  for (const tr of findAll("tr[data-r]", table)) {
    if (!rows.has(tr.dataset.r)) rows.set(tr.dataset.r, tr);
  }
  const headings = findAll("thead th", table);
  const labels = headings.map((th) => th.textContent);

  const nameOf = (tr) => find("b", tr).textContent;
  const twinOf = (tr) => (tr.classList.contains("twin") ? null : find(".twin", tr.parentElement));

  // Every mark and every row of the table with this number.
  const partsOf = (number) => findAll(`[data-r="${number}"]`);

  function make(tag, content = "", name = "") {
    const element = document.createElement(tag);
    element.textContent = content;
    if (name) element.className = name;
    return element;
  }

  // Copies a cell's text, or its picture of the tokens with the counts beside it. The rows of
  // random are shorter than the others.
  function copyCell(cell) {
    const copy = make("td");
    if (!cell) return copy;
    const pyramid = find(".pyramid", cell);
    if (!pyramid) {
      for (const node of cell.childNodes) copy.append(node.cloneNode(true));
      return copy;
    }
    copy.append(pyramid.cloneNode(true), make("div", find("title", pyramid).textContent));
    return copy;
  }

  // Makes a table with a column for each of these rows and a line for each number of theirs.
  function compare(shown) {
    const made = make("table", "", "compare");
    const head = made.createTHead().insertRow();
    head.append(make("th"));
    for (const tr of shown) {
      const th = make("th");
      const key = find(".key", tr);
      if (key) th.append(key.cloneNode(true), " ");
      th.append(find("b", tr).cloneNode(true));
      head.append(th);
    }
    const body = made.createTBody();
    labels.forEach((label, place) => {
      const cells = shown.map((tr) => tr.cells[place]);
      if (place === 0 || cells.every((cell) => !cell || cell.textContent === "-")) return;
      const line = body.insertRow();
      line.append(make("th", label), ...cells.map(copyCell));
    });
    return made;
  }

  // ---------------------------------------------------------------- hover

  // Where each mark lies, in units of its chart.
  const marks = new Map();
  for (const svg of findAll(".charts svg")) {
    const place = (mark) => {
      const [x, y] = [mark.cx ?? mark.x, mark.cy ?? mark.y];
      return { mark, x: x.baseVal.value, y: y.baseVal.value };
    };
    marks.set(svg, findAll("[data-r]", svg).map(place));
  }

  const isShown = (element) => element.getClientRects().length > 0;

  // Finds the visible mark that is nearest to the pointer; null if none is near.
  function nearestMark(svg, event) {
    const box = svg.getBoundingClientRect();
    const scale = svg.viewBox.baseVal.width / box.width;
    const x = (event.clientX - box.left) * scale;
    const y = (event.clientY - box.top) * scale;
    let best = null;
    let least = NEAR * Math.max(1, scale);
    for (const each of marks.get(svg)) {
      const apart = Math.hypot(each.x - x, each.y - y);
      if (apart < least && isShown(each.mark)) [best, least] = [each.mark, apart];
    }
    return best;
  }

  let pointed = null; // the number of the row that the pointer is at

  function point(number) {
    if (number === pointed) return;
    pointed = number;
    for (const element of findAll(".on")) element.classList.remove("on");
    for (const chart of charts) chart.classList.toggle("hot", number !== null);
    if (number === null) return;
    for (const element of partsOf(number)) {
      element.classList.add("on");
      element.closest(".series, .twin")?.classList.add("on");
    }
  }

  function showCard(number, event) {
    const tr = rows.get(number);
    const twin = twinOf(tr);
    if (card.dataset.of !== number) {
      card.dataset.of = number;
      card.replaceChildren(compare(twin ? [tr, twin] : [tr]));
    }
    card.hidden = false;
    const { width, height } = card.getBoundingClientRect();
    const right = event.clientX + 18;
    const left = right + width > innerWidth - 8 ? event.clientX - 18 - width : right;
    card.style.left = `${Math.max(8, left)}px`;
    card.style.top = `${Math.max(8, Math.min(event.clientY - 20, innerHeight - height - 8))}px`;
  }

  function leave() {
    point(null);
    card.hidden = true;
  }

  for (const svg of marks.keys()) {
    svg.addEventListener("pointermove", (event) => {
      const number = nearestMark(svg, event)?.dataset.r ?? null;
      svg.style.cursor = number === null ? "" : "pointer";
      if (number === null) return leave();
      point(number);
      // A finger would lie on the card; it pins instead.
      if (event.pointerType === "mouse") showCard(number, event);
    });
    svg.addEventListener("pointerleave", leave);
    svg.addEventListener("click", (event) => {
      const mark = nearestMark(svg, event);
      if (mark) pin(mark.dataset.r);
    });
  }

  table.addEventListener("pointerover", (event) => {
    const number = event.target.closest("tbody tr")?.dataset.r ?? null;
    point(number);
  });
  table.addEventListener("pointerleave", leave);

  // ---------------------------------------------------------------- pins

  let pinned = [];

  function pin(number) {
    if (pinned.includes(number)) pinned = pinned.filter((each) => each !== number);
    else pinned = [...pinned, number].slice(-MOST_PINS);
    showPins();
  }

  function showPins() {
    for (const element of findAll(".pinned")) element.classList.remove("pinned");
    for (const number of pinned) {
      for (const element of partsOf(number)) element.classList.add("pinned");
    }
    pins.hidden = pinned.length === 0;
    if (pins.hidden) return;
    const close = make("button", "close");
    close.type = "button";
    close.addEventListener("click", unpin);
    const head = make("header");
    const hint = pinned.length < MOST_PINS ? "Pinned. Pin another to compare." : "Pinned";
    head.append(make("strong", hint), close);
    pins.replaceChildren(head, compare(pinned.map((number) => rows.get(number))));
  }

  function unpin() {
    pinned = [];
    showPins();
  }

  for (const tr of findAll("tbody tr", table)) tr.tabIndex = 0;
  table.addEventListener("click", (event) => {
    const tr = event.target.closest("tbody tr");
    if (tr && !event.target.closest("label")) pin(tr.dataset.r);
  });
  table.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && event.target.matches("tbody tr")) pin(event.target.dataset.r);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") unpin();
  });

  // ---------------------------------------------------------------- filter

  const search = find("#find");
  const methods = findAll(".legend input");
  const bodies = findAll("tbody:not(.dense)", table);

  // Shows the rows whose names have all the words; methods are hidden by the style sheet.
  function filter() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const left = new Set(findAll("tbody.dense tr", table).map((tr) => tr.dataset.r));
    for (const body of bodies) {
      const name = nameOf(body).toLowerCase();
      const gone = !words.every((word) => name.includes(word));
      body.classList.toggle("gone", gone);
      if (!gone) for (const tr of body.rows) left.add(tr.dataset.r);
    }
    for (const found of marks.values()) {
      for (const { mark } of found) mark.classList.toggle("gone", !left.has(mark.dataset.r));
    }
    for (const group of findAll(".charts .series, .charts .twin")) {
      group.classList.toggle("gone", !find("[data-r]:not(.gone)", group));
    }
    for (const chart of charts) chart.classList.toggle("filtered", words.length > 0);
    count();
  }

  function count() {
    const shown = bodies.filter(isShown).length;
    find("#count").textContent = `${shown} of ${bodies.length} rows`;
  }

  function choose(checked) {
    for (const box of methods) box.checked = checked;
    count();
  }

  search.addEventListener("input", filter);
  for (const box of methods) box.addEventListener("change", count);
  find("#every").addEventListener("click", () => choose(true));
  find("#none").addEventListener("click", () => choose(false));
  filter(); // a browser that goes back to the page may have kept the words

  // ---------------------------------------------------------------- sort

  // Numbers by their size, names by the alphabet, and what was not measured last.
  function order(place, down) {
    const key = (body) => {
      const cell = body.rows[0].cells[place];
      if (place === 0) return nameOf(body);
      const picture = find("title", cell)?.textContent ?? "";
      return Number.parseFloat(cell.textContent.slice(picture.length));
    };
    const sign = down ? -1 : 1;
    return (one, other) => {
      const [a, b] = [key(one), key(other)];
      if (place === 0) return sign * a.localeCompare(b, "en");
      if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
      return sign * (a - b);
    };
  }

  // The first click brings the best to the top, the second the worst. Dense stays above all.
  function sortBy(th) {
    const place = headings.indexOf(th);
    const before = th.getAttribute("aria-sort");
    const bestIsHigh = th.dataset.best === "high";
    const down = before ? before === "ascending" : bestIsHigh;
    for (const each of headings) each.removeAttribute("aria-sort");
    th.setAttribute("aria-sort", down ? "descending" : "ascending");
    table.classList.add("sorted");
    table.append(...[...bodies].sort(order(place, down)));
  }

  for (const th of headings) {
    const button = make("button");
    button.append(...th.childNodes);
    button.type = "button";
    button.addEventListener("click", () => sortBy(th));
    th.append(button);
  }

  // ---------------------------------------------------------------- download

  // Makes the object of a row again, whose fields stand in columns such as "latency.median".
  function unpack(columns, place) {
    const row = {};
    for (const [column, values] of Object.entries(columns)) {
      const [field, part] = column.split(".");
      // Of one image there is a mean and no error: that is null, and belongs to the mean.
      if (values[place] === null && !(part && row[field])) continue;
      if (part) (row[field] ??= {})[part] = values[place];
      else row[field] = values[place];
    }
    return row;
  }

  function quote(value) {
    const text = value === null ? "" : [value].flat().join(" ");
    return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  }

  function save(name, type, text) {
    const link = make("a");
    link.download = name;
    link.href = URL.createObjectURL(new Blob([text], { type }));
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  // The data is compressed, so that a page of many rows stays small. A browser from before 2023
  // cannot unpack it, and is told so.
  function readData() {
    const bytes = Uint8Array.from(atob(find("#data").textContent), (each) => each.charCodeAt(0));
    const unzipped = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(unzipped).json();
  }

  if (!("DecompressionStream" in window)) {
    for (const button of findAll("#json, #csv")) {
      button.disabled = true;
      button.title = "This browser is too old to save the numbers: use one from 2023 or later.";
    }
  }

  find("#json").addEventListener("click", async () => {
    const { report, columns } = await readData();
    const whole = { ...report, rows: columns.name.map((_, place) => unpack(columns, place)) };
    save("report.json", "application/json", `${JSON.stringify(whole, null, 1)}\n`);
  });
  find("#csv").addEventListener("click", async () => {
    const { columns } = await readData();
    const all = columns.name.map((_, place) => Object.values(columns).map((each) => each[place]));
    const lines = [Object.keys(columns), ...all].map((values) => values.map(quote).join(","));
    save("report.csv", "text/csv", `${lines.join("\n")}\n`);
  });
})();
