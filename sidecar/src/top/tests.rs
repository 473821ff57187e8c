use std::net::IpAddr;
use std::time::Duration;

use expect_test::expect;
use proptest::prelude::*;

use super::*;
use crate::desired::samples;

fn desired() -> Desired {
    Desired::new(samples::spoke(), samples::TODAY).expect("a path")
}

fn at(second: u64) -> Stamp {
    Stamp::from_unix(1_795_000_000 + i64::try_from(second).expect("soon"))
}

fn told() -> Told {
    let drift =
        Drift { at: at(3), text: "repaired by nft (pid 812): firewall-changed table inet spokeguard".into() };
    Told { verdict: Verdict::Ok, findings: 0, blind: 0, drift: vec![drift] }
}

fn key(direction: Direction, class: Option<u16>) -> TrafficKey {
    TrafficKey { scope: Scope::Public, direction, family: Family::Ipv4, proto: CountedProto::Tcp, class }
}

fn sample(second: u64, packets: u64, bytes: u64) -> Sample {
    let amount = Amount { packets, bytes };
    Sample {
        at: Duration::from_secs(second),
        traffic: [(key(Direction::In, Some(0)), amount), (key(Direction::Out, None), amount)].into(),
        dropped: [("drop-ssh-ipv4".to_owned(), packets), ("drop-ssh-ipv6".to_owned(), 1)].into(),
    }
}

fn syn(source: IpAddr, port: u16) -> Syn {
    Syn { source, destination: [198, 51, 100, 1].into(), port, onward: None }
}

/// Someone who knocks at 22 and 23, someone who may come in, a crowd, and some traffic.
fn watch() -> Watch {
    let mut watch = Watch::new(at(0));
    let desired = desired();
    watch.sample(sample(10, 100, 1000));
    for n in 0..40u8 {
        watch.knock(&desired, &syn([192, 0, 2, 7].into(), 22), Boot(0));
        watch.knock(&desired, &syn([192, 0, 2, 7].into(), 23), Boot(0));
        watch.knock(
            &desired,
            &syn("2001:db8:1111:2222:3333:4444:5555:6666".parse().expect("one"), 443),
            Boot(0),
        );
        watch.knock(&desired, &syn([203, 0, 113, n].into(), 3389), Boot(0));
    }
    for _ in 0..30 {
        let (from, to) = (([192, 0, 2, 9], 4000).into(), ([198, 51, 100, 1], 161).into());
        watch.refused_datagram(&Datagram { from, to });
    }
    watch.sample(sample(12, 3100, 4_801_000));
    watch
}

#[test]
fn a_screen_of_eighty_by_twenty_four() {
    let mut frame = watch().frame(&desired(), told(), at(12), vec![]);
    frame.missed = 1200;
    let text: Vec<String> =
        page(&frame, 80, 24).iter().map(|line| line.to_string().trim_end().to_owned()).collect();
    expect![[r#"
        singapore: as the policy says                                       11:06:52 UTC
        TRAFFIC                             in pkt/s      in B/s   out pkt/s     out B/s
        public                                  1.5k        2.4M        1.5k        2.4M
        mesh                                       0           0           0           0
        other                                      0           0           0           0
          http tcp/80                           1.5k        2.4M           0           0
          other tcp                                0           0        1.5k        2.4M
          https tcp/443                            0           0           0           0
          ssh tcp/22                               0           0           0           0
          metrics tcp/9984                         0           0           0           0
          other udp                                0           0           0           0

        DROPPED packets: ssh 3.1k (1.5k/s)
        REFUSED PORT          tries     /s  BUSIEST STRANGERS       tries     /s   ports
           22/tcp ssh            40     20  192.0.2.7                  80     40       2
           23/tcp telnet         40     20  2001:db8:1…:5555:6666      40     20    :443
         3389/tcp ms-wbt-s…      40     20  192.0.2.9                  30     15    :161
          161/udp snmp           30     15  203.0.113.0                 1    0.5   :3389
                                            203.0.113.1                 1    0.5   :3389
                                            203.0.113.2                 1    0.5   :3389

        RECENT DRIFT
        11:06:43 repaired by nft (pid 812): firewall-changed table inet spokeguard
        q quits; tries since 11:06:40, 1.2k more came too fast to look at"#]]
    .assert_eq(&text.join("\n"));
}

#[test]
fn who_may_come_in_is_a_stranger_and_not_refused() {
    let frame = watch().frame(&desired(), told(), at(12), vec![]);
    let refused: Vec<(Proto, u16, u64)> =
        frame.refused.iter().map(|port| (port.proto, port.port, port.tries)).collect();
    let tcp = |port| (Proto::Tcp, port, 40);
    assert_eq!(refused, [tcp(22), tcp(23), tcp(3389), (Proto::Udp, 161, 30)]);
    let first = &frame.strangers[0];
    assert_eq!((first.address, first.tries, first.refused, first.ports), ([192, 0, 2, 7].into(), 80, 80, 2));
    assert_eq!(frame.strangers[1].refused, 0, "443 is public: {:?}", frame.strangers[1]);
    assert_eq!(frame.strangers[1].per_second, 20.0);
    let http = frame.services.iter().find(|flow| flow.inward.packets > 0.0).expect("traffic");
    assert_eq!(http.inward, Rate { packets: 1500.0, bytes: 2_400_000.0 });
    assert_eq!((frame.dropped[0].reason, frame.dropped[0].packets), ("ssh", 3101));
}

#[test]
fn counters_that_begin_anew_are_no_traffic() {
    let mut watch = Watch::new(at(0));
    watch.sample(sample(1, 1000, 1000));
    watch.sample(sample(2, 10, 10));
    let frame = watch.frame(&desired(), told(), at(2), vec![]);
    assert!(frame.scopes.iter().all(|flow| flow.inward == Rate::default() && flow.out == Rate::default()));
}

#[test]
fn the_busiest_are_known_among_very_many_in_bounded_memory() {
    let mut tally: Tally<u32, ()> = Tally::new(KEPT_MAX);
    for n in 0..50_000u32 {
        tally.add(n + 10);
        if n % 50 == 0 {
            tally.add(1);
        }
    }
    let busiest = tally.busiest(3);
    assert_eq!(*busiest[0].0, 1);
    assert!((900..=1000).contains(&busiest[0].1.times), "{busiest:?}");
    assert!(busiest[1].1.times <= 1, "who came once is not called busy: {busiest:?}");
    assert_eq!(tally.busiest(usize::MAX).len(), KEPT_MAX);
}

#[test]
fn names_from_strangers_move_no_cursor() {
    let mut frame = watch().frame(&desired(), told(), at(12), vec!["\x1b]0;title\x07".into()]);
    frame.drift[0].text = "by \x1b[2Jevil\u{202e}".into();
    frame.services[0].name = "a\nb".into();
    let text = to_text(&frame, 80);
    assert!(!text.contains(['\x1b', '\x07', '\u{202e}']) && text.contains("evil"), "{text:?}");
}

proptest! {
    #[test]
    fn no_size_is_exceeded(width in 0usize..200, height in 1usize..60) {
        let frame = watch().frame(&desired(), told(), at(12), vec!["a note".repeat(30)]);
        let lines = page(&frame, width, height);
        prop_assert!(lines.len() <= height);
        for line in lines {
            let length = line.to_string().chars().count();
            prop_assert!(length <= width.max(34), "{length}: {line:?}");
        }
    }
}
