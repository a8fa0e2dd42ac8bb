-- Included by every trusted script that admits, ends or charges a request: whether anything waits at its deployment, and
-- what serving it counts in the fair queue (lib_flows.lua).

local BAND_SPAN = 1e13 -- more than any instant in ms: the first part of a place in dep:<dep>:q

-- Deployments of which this call knows that nothing waits.
local idle = {}

-- How many requests wait for a deployment.
local function n_waiting(P, did)
  if idle[did] then return 0 end
  local n = redis.call('ZCARD', P .. 'dep:' .. did .. ':q')
  idle[did] = n == 0
  return n
end

-- Service in tenths of a prompt token: a cached one costs a tenth of it, an output token twice.
local function service(n_in, n_cached, n_out)
  return 10 * (n_in - n_cached) + n_cached + 20 * n_out
end

-- The flow of a request from what it was admitted with.
local function flow_of(adm)
  return {adm[BAND], adm[WEIGHTS], adm[WEIGHTS + 1], adm[WEIGHTS + 2], adm[KEY], adm[PRJ], adm[ORG], adm[SLOT_MS] or 0,
    service(adm[IN_EST], 0, adm[PRED])}
end
