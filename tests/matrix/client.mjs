// A person's Matrix client for tests: matrix-js-sdk, which is what Element is made of, driven by lines of JSON.
//
// stdin:  {"id": 1, "do": "say", ...}    stdout: {"id": 1, "result": ...} or {"id": 1, "error": "..."}
//
// Nothing of it is known to the adapter under test, and it knows nothing of that.
import { createHash, webcrypto } from "node:crypto";
import { readFile, writeFile } from "node:fs/promises";
import { createInterface } from "node:readline";
import * as sdk from "matrix-js-sdk";
import { logger } from "matrix-js-sdk/lib/logger.js";
import { VerifierEvent } from "matrix-js-sdk/lib/crypto-api/index.js";

logger.setLevel?.("silent");
for (const name of ["log", "info", "debug", "warn", "trace", "error"]) console[name] = () => {};

let client, base, requests = [], verifier, sas;

const json = async (method, path, body, token) => {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const answer = await fetch(base + path, { method, headers, body: body && JSON.stringify(body) });
  const result = await answer.json();
  if (!answer.ok) throw new Error(JSON.stringify(result));
  return result;
};

const shown = (event) => ({
  event: event.getId(),
  sender: event.getSender(),
  type: event.getType(),
  wire: event.getWireType(),
  content: event.getContent(),
  original: event.getOriginalContent(),
  failed: event.isDecryptionFailure(),
  redacted: event.isRedacted(),
  thread: event.threadRootId ?? null,
  at: event.getTs(),
});

const b64 = (bytes) => Buffer.from(bytes).toString("base64").replace(/=+$/, "");

const commands = {
  async login({ url, user, password }) {
    base = url;
    const made = await json("POST", "/_matrix/client/v3/login", {
      type: "m.login.password", identifier: { type: "m.id.user", user }, password,
    });
    client = sdk.createClient({
      baseUrl: url, userId: made.user_id, deviceId: made.device_id, accessToken: made.access_token,
      cryptoCallbacks: { getSecretStorageKey: async () => null },
    });
    await client.initRustCrypto({ useIndexedDB: false });
    client.getCrypto().globalBlacklistUnverifiedDevices = false;
    client.on("crypto.verificationRequestReceived", (request) => requests.push(request));
    await client.startClient({ initialSyncLimit: 50, threadSupport: false });
    await new Promise((done) => client.on("sync", (state) => state === "PREPARED" && done()));
    return { user: made.user_id, device: made.device_id };
  },
  async crossSign({ password }) {
    await client.getCrypto().bootstrapCrossSigning({
      authUploadDeviceSigningKeys: (request) => request({
        type: "m.login.password", identifier: { type: "m.id.user", user: client.getUserId() }, password,
      }),
    });
  },
  async createRoom({ invite = [], name, encrypted = false, direct = false }) {
    const initial_state = encrypted
      ? [{ type: "m.room.encryption", state_key: "", content: { algorithm: "m.megolm.v1.aes-sha2" } }] : [];
    const made = await client.createRoom({
      invite, name, is_direct: direct, preset: direct ? "trusted_private_chat" : "private_chat", initial_state,
    });
    return made.room_id;
  },
  invite: ({ room, user }) => client.invite(room, user),
  join: async ({ room }) => (await client.joinRoom(room)).roomId,
  async send({ room, type = "m.room.message", content }) {
    return (await client.sendEvent(room, type, content)).event_id;
  },
  redact: async ({ room, event }) => (await client.redactEvent(room, event)).event_id,
  members: ({ room }) => (client.getRoom(room)?.getMembers() ?? []).map((m) => [m.userId, m.membership]),
  rooms: () => client.getRooms().map((room) => room.roomId),
  timeline({ room }) {
    const known = client.getRoom(room);
    return known ? known.getLiveTimeline().getEvents().map(shown) : [];
  },
  reactions({ room }) {
    const events = client.getRoom(room)?.getLiveTimeline().getEvents() ?? [];
    return events.filter((event) => event.getType() === "m.reaction" && !event.isRedacted()).map(shown);
  },
  receipt({ room, user }) {
    return client.getRoom(room)?.getEventReadUpTo(user) ?? null;
  },
  typing({ room }) {
    return (client.getRoom(room)?.getMembers() ?? []).filter((m) => m.typing).map((m) => m.userId);
  },
  // Files. The SDK leaves their encryption to the client; this is as the specification has it.
  async sendFile({ room, path, name, mimetype, msgtype = "m.file", caption }) {
    let data = await readFile(path), file;
    const info = { size: data.length, mimetype };
    const encrypted = client.isRoomEncrypted(room);
    if (encrypted) {
      const key = await webcrypto.subtle.generateKey({ name: "AES-CTR", length: 256 }, true, ["encrypt", "decrypt"]);
      const iv = new Uint8Array(16);
      webcrypto.getRandomValues(iv.subarray(0, 8));
      data = Buffer.from(await webcrypto.subtle.encrypt({ name: "AES-CTR", counter: iv, length: 64 }, key, data));
      const sha256 = b64(createHash("sha256").update(data).digest());
      file = { v: "v2", key: await webcrypto.subtle.exportKey("jwk", key), iv: b64(iv), hashes: { sha256 } };
    }
    const { content_uri } = await client.uploadContent(data, { name, type: encrypted ? undefined : mimetype });
    const where = encrypted ? { file: { ...file, url: content_uri } } : { url: content_uri };
    const content = { msgtype, body: caption ?? name, filename: name, info, ...where };
    return (await client.sendEvent(room, "m.room.message", content)).event_id;
  },
  async saveFile({ room, event, path }) {
    const content = client.getRoom(room).findEventById(event).getContent();
    const [, server, id] = /^mxc:\/\/([^/]+)\/(.+)$/.exec(content.url ?? content.file.url);
    const headers = { Authorization: `Bearer ${client.getAccessToken()}` };
    const answer = await fetch(`${base}/_matrix/client/v1/media/download/${server}/${id}`, { headers });
    let data = Buffer.from(await answer.arrayBuffer());
    if (content.file) {
      const { key, iv, hashes } = content.file;
      if (b64(createHash("sha256").update(data).digest()) !== hashes.sha256) throw new Error("hash");
      const imported = await webcrypto.subtle.importKey("jwk", key, "AES-CTR", false, ["decrypt"]);
      const counter = Buffer.from(iv, "base64");
      data = Buffer.from(await webcrypto.subtle.decrypt({ name: "AES-CTR", counter, length: 64 }, imported, data));
    }
    await writeFile(path, data);
    return { name: content.filename ?? content.body, mimetype: content.info.mimetype, size: data.length };
  },
  // Verification
  async verify({ user, room, device }) {
    const crypto = client.getCrypto();
    const request = room
      ? await crypto.requestVerificationDM(user, room)
      : await crypto.requestDeviceVerification(user, device);
    await new Promise((done, failed) => {
      const look = () => (request.phase === 3 ? done() : request.phase >= 5 ? failed(new Error("cancelled")) : 0);
      request.on("change", look);
      look();
    });
    verifier = await request.startVerification("m.sas.v1");
    const ready = new Promise((done) => verifier.on(VerifierEvent.ShowSas, done));
    verifier.finished = verifier.verify().then(() => "done", (error) => `failed: ${error}`);
    sas = await Promise.race([ready, verifier.finished]);
    if (typeof sas === "string") throw new Error(sas);
    return sas.sas.emoji.map(([, name]) => name);
  },
  async confirm() {
    await sas.confirm();
    return await verifier.finished;
  },
  mismatch: () => sas.mismatch(),
  async trust({ user, device }) {
    const crypto = client.getCrypto();
    const [whole, one] = [
      await crypto.getUserVerificationStatus(user), await crypto.getDeviceVerificationStatus(user, device),
    ];
    return {
      user: whole.isVerified(), device: one?.isVerified() ?? false,
      signed: one?.signedByOwner ?? false, local: one?.localVerified ?? false,
    };
  },
  async devices({ user }) {
    const known = await client.getCrypto().getUserDeviceInfo([user], true);
    return [...(known.get(user) ?? new Map()).values()].map((device) => [device.deviceId, device.getFingerprint()]);
  },
  async stop() {
    client?.stopClient();
  },
};

process.on("unhandledRejection", () => {});
for await (const line of createInterface({ input: process.stdin })) {
  const { id, do: name, ...rest } = JSON.parse(line);
  // Not awaited: one that waits, e.g. for a verification, must not hold up the others.
  Promise.resolve()
    .then(() => commands[name](rest))
    .then(
      (result) => process.stdout.write(JSON.stringify({ id, result: result ?? null }) + "\n"),
      (error) => process.stdout.write(JSON.stringify({ id, error: String(error?.stack ?? error) }) + "\n"),
    );
}
client?.stopClient();
process.exit(0);
