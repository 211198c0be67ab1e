"use strict";
(() => {
  const stage = document.getElementById("stage");
  const chooser = document.getElementById("chooser");
  const results = chooser ? chooser.options.length : 1;
  const panels = [stage.innerHTML];
  // Batch sizes stay hidden when another result is chosen; backends are those of one result.
  const hiddenBatches = new Set();
  let hiddenSubjects = new Set();

  // All but the first are packed by section, the same section of every result together.
  const unpack = async () => {
    const letters = atob(document.getElementById("packed").textContent);
    const bytes = Uint8Array.from(letters, (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    const sections = await new Response(stream).json();
    for (let number = 1; number < results; number++) {
      panels[number] = sections.map((ofEach) => ofEach[number - 1]).join("");
    }
  };

  const place = (mark) => {
    const { e, f } = mark.transform.baseVal.getItem(0).matrix;
    return [e, f];
  };
  const shown = (mark) => !mark.closest("[hidden]");

  // Further right and lower is better; the line has a corner at each point that no other beats both ways.
  const frontier = (marks) => {
    const corners = [];
    let lowest = -Infinity;
    for (const [x, y] of marks.map(place).sort((a, b) => b[0] - a[0] || b[1] - a[1])) {
      if (y > lowest) {
        if (corners.length) corners.push([x, lowest]);
        corners.push([x, y]);
        lowest = y;
      }
    }
    return corners;
  };

  const filter = () => {
    for (const one of stage.querySelectorAll("[data-b],[data-s]")) {
      const hide = hiddenBatches.has(one.dataset.b) || hiddenSubjects.has(one.dataset.s);
      one.toggleAttribute("hidden", hide);
    }
    for (const series of stage.querySelectorAll("g.s")) {
      const line = series.querySelector(".line");
      if (line) line.setAttribute("points", [...series.querySelectorAll("[data-b]")].filter(shown).map(place).join(" "));
    }
    for (const line of stage.querySelectorAll(".frontier")) {
      const marks = [...line.parentNode.querySelectorAll("[data-b]:not(.wrong, .emulated)")].filter(shown);
      line.setAttribute("points", frontier(marks).join(" "));
    }
  };

  const chosen = () => {
    const number = /^#r(\d+)$/.exec(location.hash);
    return number && number[1] < results ? Number(number[1]) : 0;
  };

  const show = async () => {
    const wanted = chosen();
    if (!(wanted in panels)) await unpack();
    if (wanted !== chosen()) return; // another was chosen in the meantime
    stage.innerHTML = panels[wanted];
    hiddenSubjects = new Set();
    for (const box of stage.querySelectorAll("[data-batch]")) box.checked = !hiddenBatches.has(box.dataset.batch);
    filter();
    if (chooser) chooser.value = wanted;
  };

  stage.addEventListener("change", ({ target }) => {
    const { batch, subject } = target.dataset;
    const [hidden, key] = batch === undefined ? [hiddenSubjects, subject] : [hiddenBatches, batch];
    if (target.checked) hidden.delete(key);
    else hidden.add(key);
    filter();
  });
  if (chooser) {
    document.getElementById("unscripted").remove();
    chooser.addEventListener("change", () => { location.hash = `r${chooser.value}`; });
    addEventListener("hashchange", async () => {
      await show();
      document.getElementById("result").scrollIntoView();
    });
    if (location.hash) show();
  }
})();
