// Unpacks the data, and then runs the page's script, which reads them as JSON.

async function unpacked(base64) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

const packed = document.getElementById("data");
unpacked(packed.textContent).then((text) => {
  packed.textContent = text;
  const script = document.createElement("script");
  script.textContent = document.getElementById("script").textContent;
  document.body.append(script);
});
