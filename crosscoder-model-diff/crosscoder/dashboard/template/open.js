// Unpacks the data, and then runs the page's script, which reads them as JSON; or says why it cannot.

async function unpacked(base64) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

function run(data) {
  packed.textContent = data;
  const script = document.createElement("script");
  script.textContent = document.getElementById("script").textContent;
  document.body.append(script);
}

function complain() {
  document.getElementById("list").textContent = window.DecompressionStream
    ? "The data of this page are damaged. Get the file again."
    : "This browser cannot unpack the data of this page. Open it in one from 2023 or later.";
}

const packed = document.getElementById("data");
unpacked(packed.textContent).then(run, complain);
