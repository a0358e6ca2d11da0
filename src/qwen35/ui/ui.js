// The page asks and shows; what is asked, done and said is the program's.
"use strict";
(() => {
  const token = new URLSearchParams(location.search).get("token");
  const find = (what, where = document) => where.querySelector(what);
  const all = (what, where = document) => [...where.querySelectorAll(what)];
  const make = (name, attributes = {}, ...children) => {
    const made = Object.assign(document.createElement(name), attributes);
    made.append(...children);
    return made;
  };
  const headers = { authorization: `Bearer ${token}`, "content-type": "application/json" };
  const ask = async (path, body, signal) => {
    let reply;
    try {
      reply = await fetch(path, { method: "POST", headers, body: JSON.stringify(body), signal });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("qwen35 ui does not answer: is it still running?");
    }
    const said = await reply.json();
    if (!reply.ok) throw new Error(said.error);
    return said;
  };

  // --- one section at a time

  const sections = all("main > section[hidden]");
  const turn = () => {
    const name = location.hash.slice(1);
    const chosen = sections.find(({ id }) => id === name) || sections[0];
    sections.forEach((section) => { section.hidden = section !== chosen; });
    all("nav a").forEach((a) => {
      if (a.hash === `#${chosen.id}`) a.setAttribute("aria-current", "page");
      else a.removeAttribute("aria-current");
    });
    all("form.entries", chosen).forEach((form) => look(form));
  };

  // --- what a form says

  const valuesOf = (form) => {
    const values = {};
    for (const { name, type, value, checked, dataset } of form.elements) {
      if (!name) continue;
      if (name === "types") {
        values.types = [...(values.types || []), ...(checked ? [value] : [])];
      } else if (type === "checkbox") values[name] = checked;
      else if ("list" in dataset) values[name] = value.split("\n");
      else if (value.trim() || !values[name]) values[name] = value;
    }
    if (form.dataset.action === "fit") {  // the same model and choices as the form above
      const { model, recipe, mmproj, imatrix, mtp } = valuesOf(find("form[data-action=gguf]"));
      return { model, recipe, mmproj, imatrix, mtp, ...values };
    }
    return values;
  };
  const fill = (action, values) => {
    const form = find(`form[data-action=${action}]`);
    for (const [name, value] of Object.entries(values)) {
      const field = form.elements[name];
      if (field) field.value = Array.isArray(value) ? value.join("\n") : value;
    }
    location.hash = action;
    look(form);
    form.elements[0].focus();
  };

  // --- commands and plans, while one types

  const asked = new WeakMap();
  const look = async (form) => {
    asked.get(form)?.abort();
    const control = new AbortController();
    asked.set(form, control);
    const action = form.dataset.action, values = valuesOf(form);
    all("select[name=recipe]", form).forEach((select) => {
      select.nextElementSibling.textContent = select.selectedOptions[0].dataset.about;
    });
    const panel = action === "fit" ? find(".fitting") : find(".plan", form.closest("section"));
    panel?.classList.add("old");
    let said = {}, wrong = "";
    try {
      said = await ask("/preview", { action, values }, control.signal);
    } catch (error) {
      if (error.name === "AbortError") return;
      wrong = error.message;
    }
    const begun = action === "fit" ? values.fit : values.model;
    find(".command code", form).replaceChildren(...words(said.command || ""));
    find(".wrong", form).textContent = panel && !begun ? "" : said.error || wrong;
    panel?.classList.remove("old");
    if (said.plan) showPlan(panel, said);
    else if (action === "fit") showFit(panel, said.fit);
    else if (panel && begun) panel.replaceChildren();
  };
  const soon = (form, wait) => {
    clearTimeout(form.waiting);
    form.waiting = setTimeout(() => look(form), wait);
  };

  const table = (heads, rows) => make("div", { className: "scroll", tabIndex: 0 },
    make("table", {},
      make("thead", {}, make("tr", {}, ...heads.map((head) =>
        make(head ? "th" : "td", head ? { scope: "col" } : {}, head)))),
      make("tbody", {}, ...rows.map(([first, ...rest]) => make("tr", {},
        make("th", { scope: "row" }, first), ...rest.map((cell) => make("td", {}, cell)))))));
  const coloured = (name, i) => {
    const made = make(name);
    made.style.setProperty("--colour", `var(--series-${i % 8})`);
    return made;
  };
  const words = (text) => text.split(/(?<= )/).map((word) => make("span", {}, word));
  const commandLine = (text) => make("p", { className: "command" }, make("code", {}, ...words(text)),
    make("button", { type: "button", className: "copy" }, "Copy"));
  const notes = (lines) => lines.map((line) => make("p", { className: "soft" }, `note: ${line}`));

  const showPlan = (panel, { plan, plan_command }) => {
    const bar = make("div", { className: "bar", ariaHidden: "true" });
    const legend = make("ul", { className: "legend" });
    plan.shares.forEach(([name, bytes, size], i) => {
      const part = coloured("span", i);
      part.style.flexGrow = bytes;
      bar.append(part);
      legend.append(make("li", {}, coloured("i", i), `${name} ${size}`));
    });
    const open = find("details", panel)?.open || false;
    panel.replaceChildren(
      commandLine(plan_command),
      make("dl", { className: "figures" }, ...plan.figures.map(([name, value]) =>
        make("div", {}, make("dt", {}, name), make("dd", {}, value)))),
      bar, legend,
      table(["file", "bytes"], plan.files),
      ...notes(plan.notes),
      make("details", { open }, make("summary", {}, "Every tensor"),
        make("pre", { tabIndex: 0 }, plan.text)),
    );
  };
  const showFit = (panel, fit) => {
    if (!fit) return panel.replaceChildren();
    const pick = (type) => {
      const button = make("button", { type: "button", className: "plain" }, "Choose");
      button.setAttribute("aria-label", `choose ${type}`);
      button.addEventListener("click", () => {
        const form = find("form[data-action=gguf]");
        all("[name=types]", form).forEach((box) => {
          box.checked = box.value === type;
          if (box.checked && box.closest("details")) box.closest("details").open = true;
        });
        look(form);
      });
      return button;
    };
    const rows = fit.rows.map(([type, file, whole, needs]) =>
      [needs ? `${type} (needs an importance matrix)` : type, file, whole, pick(type)]);
    panel.replaceChildren(make("p", { className: "soft" }, fit.about),
      table(["type", "file", "with all", ""], rows), ...notes(fit.notes));
  };

  // --- jobs

  const cards = new Map();
  const follow = {
    convert: ({ model, out }) => [["verify", { model: out, source: model }],
      ["evaluate", { base: model, candidates: out }], ["publish", { folder: out }]],
    evaluate: ({ report }) => (report ? [["report", { reports: report }]] : []),
  };
  follow.gguf = follow.convert;
  const act = (name, number, what, cls = "plain") => {
    const button = make("button", { type: "button", className: cls }, name);
    button.addEventListener("click", async () => {
      button.disabled = true;
      try {
        await ask(`/jobs/${number}/${what}`, {});
      } catch (error) { button.after(make("span", { className: "wrong" }, error.message)); }
    });
    return button;
  };
  const confirm = (job) => {
    const button = make("button", { type: "button", className: "main" }, "Publish this");
    button.addEventListener("click", () => {
      const dialog = find("dialog");
      find("code", dialog).replaceChildren(...words(job.apply));
      // not onclose: that event waits for a frame, and by then another answer may stand there
      find("form", dialog).onsubmit = ({ submitter }) => {
        if (submitter.value !== "yes") return;
        ask(`/jobs/${job.number}/apply`, {}).catch((error) => {
          button.after(make("span", { className: "wrong" }, error.message));
        });
      };
      dialog.showModal();
    });
    return button;
  };
  const showJob = (job) => {
    const old = cards.get(job.number), going = job.state.startsWith("running");
    const state = make("div", { className: "state" },
      make("strong", { className: `is-${job.state}` }, job.state));
    if (going) state.append(act("Cancel", job.number, "cancel"));
    if (job.apply) state.append(confirm(job));
    if (job.state === "done") {
      for (const [action, values] of follow[job.action]?.(job.values) || []) {
        const button = make("button", { type: "button", className: "plain" }, `${action[0].toUpperCase()}${action.slice(1)} it`);
        button.addEventListener("click", () => fill(action, values));
        state.append(button);
      }
    }
    const parts = [commandLine(job.command), state];
    if (going || job.state === "cancelling") {
      const { share, title, left } = job.progress || {};
      const bar = make("progress", { max: 100, ariaLabel: `job ${job.number}` });
      if (share !== undefined) {
        bar.value = share;
        state.append(make("span", { className: "soft" }, `${title}: ${share} %${left === null ? "" : `, about ${left} s left`}`));
      }
      parts.push(make("div", {}, bar));
    }
    const said = make("pre", { tabIndex: 0 }, job.lines.join("\n"));
    const card = make("article", { className: "job", ariaLabel: `job ${job.number}` }, ...parts, said);
    const place = find("pre", old)?.scrollTop ?? null;
    const focused = old?.contains(document.activeElement) && document.activeElement.textContent;
    if (old) old.replaceWith(card);
    else find("#jobs").prepend(card);
    said.scrollTop = going || place === null ? said.scrollHeight : place;
    if (focused) all("button", card).find((b) => b.textContent === focused)?.focus();
    if (old && !going && old.dataset.state !== job.state) {
      find("[role=status]").textContent = `job ${job.number}: ${job.state}`;
    }
    card.dataset.state = job.state;
    cards.set(job.number, card);
  };
  const showState = ({ numbers, jobs }) => {
    jobs.forEach(showJob);
    for (const [number, card] of cards) {
      if (!numbers.includes(number)) { card.remove(); cards.delete(number); }
    }
    find("#none").hidden = cards.size > 0;
  };
  const listen = async () => {
    try {
      const reply = await fetch("/events", { headers });
      const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
      for (let rest = ""; ;) {
        const { value, done } = await reader.read();
        if (done) break;
        const events = (rest + value).split("\n\n");
        rest = events.pop();
        events.forEach((event) => showState(JSON.parse(event.replace(/^data: /, ""))));
      }
    } catch { /* the server ended, or will be back */ }
    setTimeout(listen, 2000);
  };

  // --- what one does

  document.addEventListener("input", ({ target }) => {
    const form = target.form;
    if (!form?.dataset.action) return;
    soon(form, target.matches("select, [type=checkbox]") ? 0 : 300);
    if (form.dataset.action === "gguf") soon(find("form[data-action=fit]"), 350);
  });
  document.addEventListener("submit", async (event) => {
    const form = event.target, { action } = form.dataset;
    if (!action) return;  // the dialog's
    event.preventDefault();
    if (action === "fit") return look(form);
    const button = find(".main", form), wrong = find(".wrong", form);
    button.disabled = true;
    try {
      const values = valuesOf(form);
      if (action === "report") {
        const { page } = await ask("/report", { values });
        const frame = make("iframe", { src: page, title: "report" });
        frame.setAttribute("sandbox", "allow-scripts");
        find(".shown").replaceChildren(
          make("p", {}, make("a", { href: page, target: "_blank", rel: "noopener" }, "Open in a tab of its own")), frame);
      } else {
        await ask("/jobs", { action, values });
        find("#jobs-title").scrollIntoView({ block: "nearest" });
      }
      wrong.textContent = "";
    } catch (error) { wrong.textContent = error.message; }
    button.disabled = false;
  });
  document.addEventListener("click", async ({ target }) => {
    if (!target.matches(".copy")) return;
    await navigator.clipboard.writeText(target.previousElementSibling.textContent);
    target.textContent = "Copied";
    setTimeout(() => { target.textContent = "Copy"; }, 1500);
  });
  addEventListener("hashchange", turn);
  turn();
  listen();
})();
