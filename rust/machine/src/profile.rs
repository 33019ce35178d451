//! Where the guest's first vCPU spends its time: a histogram of sampled instruction addresses.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

/// Most different addresses that are counted; what comes later is added to address 0.
const MAX_ADDRESSES: usize = 64 * 1024;

/// A histogram of RIP.
#[derive(Debug, Default)]
pub struct Profile(Mutex<HashMap<u64, u32>>);

impl Profile {
    /// Counts one sample.
    pub(crate) fn add(&self, address: u64) {
        let mut samples = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = samples.len() < MAX_ADDRESSES || samples.contains_key(&address);
        let count = samples.entry(if known { address } else { 0 }).or_default();
        *count = count.saturating_add(1);
    }

    /// (address, count), most frequent first.
    pub fn samples(&self) -> Vec<(u64, u32)> {
        let samples = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut samples: Vec<_> = samples.iter().map(|(address, count)| (*address, *count)).collect();
        samples.sort_unstable_by_key(|(address, count)| (std::cmp::Reverse(*count), *address));
        samples
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn samples_are_sorted_and_none_is_lost(addresses in proptest::collection::vec(0u64..20, 0..500)) {
            let profile = Profile::default();
            addresses.iter().for_each(|address| profile.add(*address));
            let samples = profile.samples();
            prop_assert_eq!(samples.iter().map(|(_, count)| *count as usize).sum::<usize>(), addresses.len());
            prop_assert!(samples.is_sorted_by_key(|(_, count)| std::cmp::Reverse(*count)));
        }
    }
}
