from .ad_schedule import PlanCounts, ad_schedule, check_window, plan_counts, smallest_gap
from .scheduling_ad import ADScheduler, ADSchedulerOutput


__all__ = [
    "ADScheduler",
    "ADSchedulerOutput",
    "PlanCounts",
    "ad_schedule",
    "check_window",
    "plan_counts",
    "smallest_gap",
]
