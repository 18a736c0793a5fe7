from .ad_schedule import ADPlan, PlanCounts, PlanRow, ad_schedule, check_window, plan_counts, smallest_gap
from .scheduling_ad import ADScheduler, ADSchedulerOutput


__all__ = [
    "ADPlan",
    "ADScheduler",
    "ADSchedulerOutput",
    "PlanCounts",
    "PlanRow",
    "ad_schedule",
    "check_window",
    "plan_counts",
    "smallest_gap",
]
