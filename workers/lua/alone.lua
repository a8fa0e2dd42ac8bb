-- One request by itself: `one` is the script that admit_several.lua or settle_several.lua calls for each of many.
local answer = one(ARGV)
write_scopes()
return answer
