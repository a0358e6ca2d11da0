// What a report does beyond showing itself: sorted tables, values under the pointer, printing.
"use strict";
(() => {
  const make = (name, cls) => Object.assign(document.createElement(name), { className: cls || "" });

  // --- sorted tables

  const value = (row, i) => row.cells[i].dataset.value ?? row.cells[i].textContent;
  const compare = (a, b) => {
    const x = parseFloat(a), y = parseFloat(b);
    const numbers = !Number.isNaN(x) && !Number.isNaN(y);
    return numbers ? x - y : Number.isNaN(x) - Number.isNaN(y) || a.localeCompare(b);
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, i) => {
      const button = make("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const up = head.getAttribute("aria-sort") !== "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const body = table.tBodies[0], rows = [...body.rows];
        rows.sort((a, b) => (up ? 1 : -1) * compare(value(a, i), value(b, i)));
        body.append(...rows);
      });
    });
  }

  // --- values under the pointer

  const tip = make("div", "tip");
  tip.hidden = true;
  document.body.append(tip);
  const say = (text, x, y) => {
    tip.textContent = text;
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    const left = Math.min(x + 14, document.documentElement.clientWidth - width - 4);
    tip.style.left = `${Math.max(4, left)}px`;
    tip.style.top = `${y - height - 12 < 4 ? y + 18 : y - height - 12}px`;
  };
  const hush = () => { tip.hidden = true; };

  const nearest = (spots, box, x, y) => {
    let best = null, least = 32;
    for (const [u, v, text] of spots) {
      const away = Math.hypot(box.left + u * box.width - x, box.top + v * box.height - y);
      if (away < least) [best, least] = [text, away];
    }
    return best;
  };
  const onTrack = ({ tracks, ends: [first, last] }, box, x, y) => {
    const u = ((x - box.left) / box.width - first) / (last - first), v = (y - box.top) / box.height;
    const track = tracks.find(([, bottom]) => v < bottom);
    if (!track || v < tracks[0][0] || u < 0 || u >= 1) return null;
    const [, , name, values] = track, i = Math.floor(u * values.length);
    const places = [i, i + 1].map((k) => Math.round((100 * k) / values.length));
    return `${name}\n${values[i].toPrecision(3)} nats\n${places.join(" to ")} % of the text`;
  };
  for (const figure of document.querySelectorAll("figure[data-hover]")) {
    const hover = JSON.parse(figure.dataset.hover), drawing = figure.querySelector("svg");
    drawing.querySelectorAll("title").forEach((title) => title.remove());
    const show = ({ clientX: x, clientY: y }) => {
      const box = drawing.getBoundingClientRect();
      const text = hover.spots ? nearest(hover.spots, box, x, y) : onTrack(hover, box, x, y);
      if (text === null) hush();
      else say(text, x, y);
    };
    drawing.addEventListener("pointermove", show);
    drawing.addEventListener("pointerdown", show);
    drawing.addEventListener("pointerleave", hush);
  }
  for (const passage of document.querySelectorAll(".passage")) {
    passage.addEventListener("click", ({ target, clientX: x, clientY: y }) => {
      if (target.title) say(target.title, x, y);
    });
    passage.addEventListener("pointerleave", hush);
  }
  document.addEventListener("keydown", ({ key }) => { if (key === "Escape") hush(); });

  // --- printing: figures are unfolded, tokens as the reader left them

  addEventListener("beforeprint", () => {
    hush();
    for (const one of document.querySelectorAll("details.printed:not([open])")) {
      one.dataset.folded = "";
      one.open = true;
    }
  });
  addEventListener("afterprint", () => {
    for (const one of document.querySelectorAll("details[data-folded]")) {
      one.open = false;
      delete one.dataset.folded;
    }
  });
})();
