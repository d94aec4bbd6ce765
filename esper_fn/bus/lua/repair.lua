-- KEYS: keys of a run. ARGV: their types. Removes keys of another type, which are foreign.
local removed = {}
for i, key in ipairs(KEYS) do
  local kind = redis.call('TYPE', key)['ok']
  if kind ~= 'none' and kind ~= ARGV[i] then
    redis.call('DEL', key)
    removed[#removed + 1] = key .. ' (' .. kind .. ')'
  end
end
return removed
