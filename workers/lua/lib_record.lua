-- Included by every trusted script that reads or writes what a request was admitted with. That never changes, so it
-- lies in one field of the record, `adm` (msgpack; workers/records.py reads it, too): a field each would
-- cost Redis three times the CPU and memory. What changes is a field of its own: state, gw, stream, epoch, attempt,
-- rid, mid, and, where they differ from what was admitted or from 0, money, hold_out, granted, pred, n, chg, and
-- of deaths (withdraw.lua) crashes, deaths, death_n.
--
-- Places in `adm`: deployment, price version, prompt tokens (estimate), output tokens asked, money held (nano), instant
-- of admission (ms), band, output tokens expected, prefix hashes, note, key, project, organization, their weights, and
-- which of them limit what: input_tpm, output_tpm, budget of key, project, organization (-1 = not); the ms that it was
-- predicted to keep a slot busy; where there are any, its window budgets (lib_windows.lua); and, where it is limited, its
-- end customer's scope, input_tpm, output_tpm and budget.
local DEP, PRICE, IN_EST, OUT_EST, MONEY, ADM_MS, BAND, PRED, PFX, NOTE = 1, 2, 3, 4, 5, 6, 7, 8, 9, 10
local KEY, PRJ, ORG, WEIGHTS, CAPS, SLOT_MS, WINDOWS, ENDS = 11, 12, 13, 14, 17, 26, 27, 28

-- A later version adds places at the end only: an earlier one ignores them, and finds nil where they are missing.

-- As the version before packed records wrote it: a field each. Requests that were in flight over an upgrade are read
-- like this for some hours; nil where there is no such record.
local function admitted_in_fields(rec_key)
  local r = redis.call('HMGET', rec_key, 'dep', 'pv', 'in_est', 'out_est', 'money', 'adm_ms', 'fq', 'pred', 'pfx', 'note', 'key',
                       'prj', 'org', 'caps')
  if not (r[1] and r[14]) then return nil end
  local band, key_weight, prj_weight, org_weight = string.match(r[7] or '', '^(%d+),(%d+),(%d+),(%d+)$')
  local adm = {r[1], r[2], tonumber(r[3]), tonumber(r[4]), tonumber(r[5]), tonumber(r[6]), band or '0', tonumber(r[8] or '0'),
    r[9] or '', r[10] or '', r[11], r[12], r[13], tonumber(key_weight or '100'), tonumber(prj_weight or '100'),
    tonumber(org_weight or '100')}
  for cap in string.gmatch(r[14], '[^,]+') do adm[#adm + 1] = tonumber(cap) end
  return adm
end

-- `packed`: the field `adm` of that record, which may be missing.
local function admitted(packed, rec_key)
  if packed then return cmsgpack.unpack(packed) end
  return admitted_in_fields(rec_key)
end
