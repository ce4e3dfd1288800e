/** Camera dialog: a live picture with a shutter, or the device's camera app without camera access. */

import { element, note } from "./dom.js";
import { say, words } from "./words.js";

// The camera chooses the nearest resolution.
const WANTED = { width: { ideal: 1920 }, height: { ideal: 1440 } };
const JPEG_QUALITY = 0.92;

const dialog = element("camera");
const video = element("camera-preview");
const shutter = element("shutter");
const choice = element("camera-device");
const capture = element("capture");

let stream = null;
let generation = 0;  // raised by each start and stop; a camera that opens in an earlier one is stopped
let taken = 0;
let onTaken;

/** Sets up the dialog; `take` is called with each photo, as a list of one file. */
export function setUp(take) {
  onTaken = take;
  element("camera-open").addEventListener("click", open);
  element("camera-other").addEventListener("click", () => capture.click());
  element("camera-done").addEventListener("click", () => dialog.close());
  shutter.addEventListener("click", shoot);
  choice.addEventListener("change", () => start(choice.value));
  dialog.addEventListener("close", stop);
  capture.addEventListener("change", () => {
    dialog.close();
    onTaken(capture.files);
    capture.value = "";
  });
}

function open() {
  if (!navigator.mediaDevices?.getUserMedia) {  // an old browser, or a page without TLS
    capture.click();
    return;
  }
  taken = 0;
  dialog.showModal();
  start();
}

async function start(deviceId) {
  stop();
  const own = generation;
  element("camera-other").hidden = true;
  note("camera-note", say("camera.starting"));
  const which = deviceId ? { deviceId: { exact: deviceId } } : { facingMode: "environment" };
  try {
    const opened = await navigator.mediaDevices.getUserMedia({ video: { ...which, ...WANTED } });
    if (own !== generation) {  // the dialog was closed or another camera chosen
      release(opened);
      return;
    }
    stream = opened;
    opened.getVideoTracks()[0].addEventListener("ended", () => {
      if (own === generation) fail("camera.ended");
    });
    video.srcObject = opened;
    await video.play();
    await listDevices(opened);
  } catch (error) {
    if (own === generation) fail(`camera.${error.name}`);
    return;
  }
  if (own !== generation) return;
  note("camera-note", "");
  shutter.disabled = false;
  if (document.activeElement !== choice) shutter.focus();
}

function stop() {
  generation += 1;
  if (stream) release(stream);
  stream = null;
  video.srcObject = null;
  shutter.disabled = true;
}

function release(opened) {
  for (const track of opened.getTracks()) track.stop();
}

function fail(key) {
  stop();
  note("camera-note", words(key) ?? say("camera.failed"));
  element("camera-other").hidden = false;
}

async function listDevices(opened) {
  const devices = await navigator.mediaDevices.enumerateDevices();
  if (opened !== stream) return;
  const cameras = devices.filter(({ kind }) => kind === "videoinput");
  choice.replaceChildren(
    ...cameras.map(({ label, deviceId }, index) => {
      return new Option(label || say("camera.unnamed", { number: index + 1 }), deviceId);
    }),
  );
  choice.value = opened.getVideoTracks()[0].getSettings().deviceId;
  element("camera-choice").hidden = cameras.length < 2;
}

async function shoot() {
  const canvas = new OffscreenCanvas(video.videoWidth, video.videoHeight);
  canvas.getContext("2d").drawImage(video, 0, 0);
  const picture = await canvas.convertToBlob({ type: "image/jpeg", quality: JPEG_QUALITY });
  const time = new Date().toTimeString().slice(0, 8).replaceAll(":", "");
  taken += 1;
  note("camera-note", say("camera.taken", { count: taken }));
  onTaken([new File([picture], `camera-${time}-${taken}.jpg`, { type: picture.type })]);
}
