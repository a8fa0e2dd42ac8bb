/* Small behaviours of every page: copy buttons, confirm dialogs, focus after a swap, and "live" that tells the
   truth. Pages work without it, except for copying. */
(() => {
  "use strict";

  document.addEventListener("click", async (event) => {
    const copy = event.target.closest("[data-copy]");
    if (copy) {
      const source = document.querySelector(copy.dataset.copy);
      const label = copy.querySelector("span") ?? copy;
      const before = label.textContent;
      const done = await copyText(source.textContent);
      if (!done) window.getSelection().selectAllChildren(source);
      label.textContent = done ? "Copied" : "Press Ctrl+C";
      setTimeout(() => { label.textContent = before; }, 1800);
    }
    const dialog = document.getElementById("dialog");
    if (dialog?.open && (event.target === dialog || event.target.closest("[data-close]"))) {
      event.preventDefault();
      dialog.close();
    }
    for (const menu of document.querySelectorAll("details.account[open]")) {
      if (!menu.contains(event.target)) menu.open = false;
    }
  });

  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    for (const menu of document.querySelectorAll("details.account[open]")) {
      menu.open = false;
      menu.querySelector("summary").focus();
    }
  });

  // Forms that say what they end: asked once, in the page's own dialog.
  document.addEventListener("submit", (event) => {
    const form = event.target.closest("form[data-confirm]");
    const dialog = document.getElementById("dialog");
    if (!form || !dialog || form.dataset.sure) return;
    event.preventDefault();
    const button = event.submitter;
    const part = (tag, text, className = "") => Object.assign(document.createElement(tag), { textContent: text, className });
    const box = part("div", "", "confirm");
    const title = part("h2", form.dataset.confirm);
    title.id = "dialog-title";
    const row = part("div", "", "row end");
    const stay = part("button", "Cancel", "button");
    stay.dataset.close = "";
    const go = part("button", button?.textContent.trim() || "Yes", `button primary${button?.classList.contains("danger") ? " danger" : ""}`);
    go.addEventListener("click", () => { form.dataset.sure = "1"; dialog.close(); form.requestSubmit(button); });
    row.append(stay, go);
    box.append(title, row);
    dialog.replaceChildren(box);
    dialog.showModal();
    go.focus();
  });

  async function copyText(text) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      return false; // no permission, or a page without TLS
    }
  }

  document.addEventListener("htmx:afterSwap", (event) => {
    const target = event.detail.target;
    if (target.id === "dialog" && !target.open) target.showModal();
    target.querySelector("[data-focus]")?.focus();
  });

  // Nobody looks: the next poll after the page is shown again brings it up to date.
  document.addEventListener("htmx:beforeRequest", (event) => {
    if (document.hidden && event.detail.elt.hasAttribute("data-live")) event.preventDefault();
  });

  // A poll that got no answer must not look like a quiet system.
  const pulse = () => document.getElementById("pulse");
  document.addEventListener("htmx:afterRequest", (event) => {
    if (!event.detail.elt.hasAttribute?.("data-live") || !pulse()) return;
    const status = event.detail.xhr?.status ?? 0;
    const fresh = status >= 200 && status < 400;
    pulse().classList.toggle("stale", !fresh);
    pulse().lastChild.textContent = fresh ? "Live" : "Not live";
  });
})();
