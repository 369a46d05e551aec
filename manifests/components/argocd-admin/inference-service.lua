-- Whether an InferenceService is ready, and if not, why. No field of it says which model its pods serve, so Healthy does
-- not mean that a new version has arrived: `avrt serving status` tells that.
if obj.status == nil or obj.status.conditions == nil then
  return {status = "Progressing", message = "KServe has not looked at it yet"}
end

local by_type = {}
for _, condition in ipairs(obj.status.conditions) do
  by_type[condition.type] = condition
end

local function is_true(kind)
  return by_type[kind] ~= nil and by_type[kind].status == "True"
end

local model = obj.status.modelStatus or {}
local transition = model.transitionStatus or ""
local predictor = by_type["PredictorReady"] or {}
local reason = predictor.reason or ""
local why = reason .. ": " .. (predictor.message or "")

if is_true("Stopped") then
  return {status = "Suspended", message = "stopped by the annotation serving.kserve.io/stop"}
end
-- lastFailureInfo stays for ever, so it counts only while KServe says that it is blocked.
if transition == "BlockedByFailedLoad" or transition == "InvalidSpec" then
  local failure = model.lastFailureInfo or {}
  return {status = "Degraded", message = (failure.reason or transition) .. ": " .. (failure.message or "")}
end
-- FailedCreate is not among them: a Secret that comes a moment later looks the same.
if predictor.status == "False" and (reason == "ReconcileFailed" or reason == "ProgressDeadlineExceeded") then
  return {status = "Degraded", message = why}
end
if is_true("Ready") and transition == "UpToDate" then
  return {status = "Healthy", message = "ready"}
end
if reason == "" then
  return {status = "Progressing", message = "KServe gives no reason; look at its events"}
end
return {status = "Progressing", message = why}
