//! What may not change in a Service: its addresses, families and load balancer class.

use super::cursor::{At, Errors};
use super::service::{Kind, needs_health_check};
use crate::field::FieldError;

/// Checks the step from `old` to `new`, beside the rules for any Service.
pub(super) fn check(new: &At<'_>, old: &At<'_>, errors: &mut Errors) {
    let (new, old) = (new.child("spec"), old.child("spec"));
    let (new_kind, old_kind) = (Kind::of(&new), Kind::of(&old));
    let without_addresses = |kind: &Kind<'_>| kind.name == "ExternalName";
    if !without_addresses(&new_kind) && !without_addresses(&old_kind) {
        if !(new_kind.headless && old_kind.headless) {
            let words = ("clusterIPs", "clusterIP");
            kept_in_order(&new, &old, words, errors);
        }
        if !new_kind.headless && !old_kind.headless {
            kept_in_order(&new, &old, ("ipFamilies", "ipFamily"), errors);
        }
    }
    let class = "loadBalancerClass";
    let both = new_kind.name == "LoadBalancer" && old_kind.name == "LoadBalancer";
    if both && new.child(class).value() != old.child(class).value() {
        errors.invalid(&new.child(class), "may not change once set");
    }
    let health = "healthCheckNodePort";
    let both = needs_health_check(&new) && needs_health_check(&old);
    if both && new.child(health).is_set() && new.child(health).number() != old.child(health).number() {
        errors.forbidden(&new.child(health), "field is immutable");
    }
}

/// A list of at most two: the first stays, the second may be added, or released with the policy `SingleStack`.
fn kept_in_order(new: &At<'_>, old: &At<'_>, (list, item): (&str, &str), errors: &mut Errors) {
    let (new_list, old_list) = (new.child(list), old.child(list));
    let (new_items, old_items) = (new_list.texts(), old_list.texts());
    let mut refuse = |index: usize, rule: &str| {
        errors.push(FieldError::invalid(format!("{}[{index}]", new_list.path()), new_list.json(), rule));
    };
    let Some(old_first) = old_items.first() else { return };
    let Some(new_first) = new_items.first() else {
        refuse(0, &format!("primary {item} can not be unset"));
        return;
    };
    if new_first != old_first {
        refuse(0, "may not change once set");
    }
    match (new_items.get(1), old_items.get(1)) {
        (Some(new_second), Some(old_second)) if new_second != old_second => refuse(1, "may not change once set"),
        (None, Some(_)) if new.child("ipFamilyPolicy").text() != "SingleStack" => {
            let rule = format!("must be set to 'SingleStack' when releasing the secondary {item}");
            errors.invalid(&new.child("ipFamilyPolicy"), rule);
        }
        _ => {}
    }
}
