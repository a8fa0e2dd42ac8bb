-- Included by every trusted script that reads or writes what a request was admitted with. That never changes, so it
-- lies in one field of the record, `adm` (msgpack; workers/records.py reads it, too): a field each would
-- cost Redis three times the CPU and memory. What changes is a field of its own: state, gw, stream, epoch, attempt,
-- rid, mid, and, where they differ from what was admitted or from 0, money, hold_out, granted, pred, n, chg, crashes.
--
-- Places in `adm`: deployment, price version, prompt tokens (estimate), output tokens asked, money held (nano), instant
-- of admission (ms), band, output tokens expected, prefix hashes, note, key, project, organization, their weights, and
-- which of them limit what: input_tpm, output_tpm, budget of key, project, organization (-1 = not); the ms that it was
-- predicted to keep a slot busy; and, where there are any, its window budgets (lib_windows.lua).
local DEP, PRICE, IN_EST, OUT_EST, MONEY, ADM_MS, BAND, PRED, PFX, NOTE = 1, 2, 3, 4, 5, 6, 7, 8, 9, 10
local KEY, PRJ, ORG, WEIGHTS, CAPS, SLOT_MS, WINDOWS = 11, 12, 13, 14, 17, 26, 27

local function admitted(packed)
  return cmsgpack.unpack(packed)
end
