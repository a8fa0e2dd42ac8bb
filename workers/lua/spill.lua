-- What has waited too long at a deployment is given to its overflow replicas (lib_queue.lua). Run by the watcher while
-- requests wait; admission and settling do the same where they see it.
-- ARGV: 1 cell prefix, 2 now_ms, 3 deployment. Returns how many were given.
return spill(ARGV[1], ARGV[3], tonumber(ARGV[2]))
