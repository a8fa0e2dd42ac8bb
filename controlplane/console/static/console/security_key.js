/* Says on the page what the browser or a security key refused; the dance itself is allauth's webauthn.js. */
(() => {
  "use strict";
  document.addEventListener("allauth.error", (event) => {
    event.preventDefault();
    document.getElementById("key-problem").hidden = false;
  });
})();
