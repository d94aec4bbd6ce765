local function newest(run) -- epoch and holder of the newest lease; '0' and '' if it is not valid
  local epoch = redis.call('HGET', run, 'epoch')
  local owner = redis.call('HGET', run, 'owner') or ''
  if #owner > 1000 then return '0', '' end
  local number, holder = string.match(owner, '^(%d+) (.+)$')
  if number and number == epoch and #number < 16 then return number, holder end
  return '0', ''
end
local function store_identity(run, identity)
  if identity == '' then redis.call('HDEL', run, 'identity')
  elseif redis.call('HGET', run, 'identity') ~= identity then
    redis.call('HSET', run, 'identity', identity)
  end
end
