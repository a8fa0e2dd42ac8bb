-- One request by itself: `one` is a script that pass.lua calls for each of many.
local answer = one(ARGV)
write_replicas()
write_scopes()
return answer
