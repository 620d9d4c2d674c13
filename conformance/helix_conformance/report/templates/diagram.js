"use strict";
// Every box says from which stop on, and up to which, it is there: a slider picks the stop.
for (const diagram of document.querySelectorAll(".diagram")) {
  const slider = diagram.querySelector("input[type=range]");
  if (slider === null) continue; // of a trace in which no token moves
  const now = diagram.querySelector(".now");
  const lines = [...diagram.querySelectorAll(".events button")];
  const boxes = [...diagram.querySelectorAll("[data-since]")].map((element) => ({
    element,
    since: Number(element.dataset.since),
    until: Number(element.dataset.until),
  }));
  const show = (wanted) => {
    const stop = Math.max(0, Math.min(Number(slider.max), wanted));
    slider.value = stop;
    for (const box of boxes) {
      box.element.toggleAttribute("hidden", stop < box.since || stop >= box.until);
    }
    lines.forEach((line, index) => {
      if (index === stop) line.setAttribute("aria-current", "step");
      else line.removeAttribute("aria-current");
    });
    const words = lines[stop].innerText.replace(/\s+/g, " ").trim();
    now.textContent = stop === 0 ? lines[stop].querySelector(".text").textContent : "event " + words;
    slider.setAttribute("aria-valuetext", now.textContent);
    const list = lines[stop].closest(".events");
    const top = lines[stop].offsetTop;
    if (top < list.scrollTop || top + lines[stop].offsetHeight > list.scrollTop + list.clientHeight) {
      list.scrollTop = top - list.clientHeight / 2;
    }
  };
  slider.addEventListener("input", () => show(Number(slider.value)));
  for (const button of diagram.querySelectorAll("[data-to]")) {
    button.addEventListener("click", () => show(Number(button.dataset.to)));
  }
  for (const button of diagram.querySelectorAll("[data-step]")) {
    button.addEventListener("click", () => show(Number(slider.value) + Number(button.dataset.step)));
  }
  // A diagram inside a closed failure has no layout yet: it is shown anew when that is opened.
  diagram.closest("details")?.addEventListener("toggle", () => show(Number(slider.value)));
  show(Number(diagram.dataset.first));
}
for (const button of document.querySelectorAll("[data-copy]")) {
  button.addEventListener("click", async () => {
    const command = button.previousElementSibling;
    getSelection().selectAllChildren(command); // all that is left where a page may not copy
    await navigator.clipboard.writeText(command.textContent);
    button.textContent = "Copied";
  });
}
