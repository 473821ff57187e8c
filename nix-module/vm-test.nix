# Three machines: the hub, a spoke and a stranger. For pkgs.testers.runNixOSTest.
{
  pkgs,
  spokeguard ? ./module.nix,
  # A pair for each end of the tunnel; nixpkgs keeps some that are for tests.
  keys ? import (pkgs.path + "/nixos/tests/wireguard/snakeoil-keys.nix"),
}:
let
  mesh = "10.84.0";
  public = "192.168.1";

  # Cable 1 of the test, with an address that does not depend on the order of names.
  cable =
    { lib, ... }:
    address: {
      networking.useDHCP = false;
      networking.interfaces.eth1.ipv4.addresses = lib.mkForce [
        {
          inherit address;
          prefixLength = 24;
        }
      ];
    };

  # A listener on every address.
  listener = port: {
    wantedBy = [ "multi-user.target" ];
    before = [ "spokeguard.service" ];
    serviceConfig.ExecStart = "${pkgs.python3}/bin/python3 -m http.server ${toString port} --directory /etc";
  };
in
pkgs.testers.runNixOSTest {
  name = "spokeguard";

  nodes.hub =
    { lib, ... }:
    {
      imports = [
        spokeguard
        (cable { inherit lib; } "${public}.1")
      ];
      environment.systemPackages = [
        pkgs.curl
        pkgs.netcat
      ];
      environment.etc."wireguard/key" = {
        mode = "0400";
        text = keys.peer0.privateKey;
      };
      services.spokeguard = {
        enable = true;
        profile = "hub";
        wireguard.privateKeyFile = "/etc/wireguard/key";
        hub.spokes.spoke = {
          address = [ "${mesh}.2" ];
          inherit (keys.peer1) publicKey;
        };
        settings = {
          node.name = "hub";
          mesh.address = [ "${mesh}.1" ];
          mesh.prefix = [ "${mesh}.0/24" ];
          ssh.from = "mesh";
          # Machines without KVM boot slowly.
          enforce.confirm_within = "10m";
        };
      };
    };

  nodes.spoke =
    { lib, ... }:
    {
      imports = [
        spokeguard
        (cable { inherit lib; } "${public}.2")
      ];
      environment.systemPackages = [ pkgs.wireguard-tools ];
      environment.etc."wireguard/key" = {
        mode = "0400";
        text = keys.peer1.privateKey;
      };
      systemd.services.web = listener 80;
      systemd.services.database = listener 5432;
      services.spokeguard = {
        enable = true;
        profile = "spoke";
        wireguard.privateKeyFile = "/etc/wireguard/key";
        settings = {
          node.name = "spoke";
          mesh.address = [ "${mesh}.2" ];
          mesh.prefix = [ "${mesh}.0/24" ];
          mesh.hub = {
            address = "${mesh}.1";
            public_key = keys.peer0.publicKey;
            endpoint = "${public}.1:51820";
          };
          public.tcp = [ 80 ];
          enforce.confirm_within = "10m";
        };
      };
    };

  nodes.outsider =
    { lib, ... }:
    {
      imports = [ (cable { inherit lib; } "${public}.3") ];
      environment.systemPackages = [
        pkgs.curl
        pkgs.netcat
        pkgs.nmap
      ];
    };

  testScript = ''
    start_all()
    for machine in hub, spoke:
        machine.wait_for_unit("spokeguard.service")
        machine.wait_for_unit("sshd.service")
    outsider.wait_for_unit("multi-user.target")


    def hub_comes():
        # A connection that stays for a moment is what confirms the rules. This nc outstays its input
        # and has to be ended, and the driver runs commands with pipefail.
        hub.wait_until_succeeds("(sleep 5 | timeout 20 nc ${mesh}.2 22 || true) | grep SSH-2.0")


    def outsider_meets_what_is_public():
        outsider.wait_until_succeeds("curl --fail --silent --max-time 5 http://${public}.2/")
        for port in 22, 5432, 9984:
            outsider.fail(f"nc -z -w 3 ${public}.2 {port}")


    with subtest("the hub's connection confirms the spoke's rules, its operator the hub's"):
        hub.wait_until_succeeds("spokeguard confirm")
        hub_comes()
        spoke.wait_until_succeeds("spokeguard status --format json | grep '\"confirmed\"'")

    with subtest("a stranger meets what is public, and nothing else"):
        outsider_meets_what_is_public()
        found = outsider.succeed("nmap -Pn -n -sS -p- --min-rate 5000 -oG - ${public}.2")
        assert "80/open/" in found, found
        assert found.count("/open/") == 1, found

    with subtest("sshd listens on the mesh address alone"):
        listening = spoke.succeed("ss -Hltn 'sport = :22'")
        assert "${mesh}.2:22" in listening, listening
        assert len(listening.splitlines()) == 1, listening

    with subtest("metrics are for the hub, through the tunnel"):
        hub.succeed("curl -fs --max-time 5 http://${mesh}.2:9984/metrics | grep spokeguard_verdict")

    with subtest("a table that is taken away comes back"):
        spoke.succeed("nft delete table inet spokeguard")
        spoke.wait_until_succeeds("nft list table inet spokeguard")
        outsider_meets_what_is_public()

    with subtest("a keepalive that is turned off comes back"):
        spoke.succeed("wg set wg0 peer ${keys.peer0.publicKey} persistent-keepalive 0")
        spoke.wait_until_succeeds("wg show wg0 persistent-keepalive | grep -w 25")

    with subtest("a rebuilt firewall leaves our table alone"):
        spoke.succeed("systemctl restart nftables.service")
        spoke.succeed("nft list table inet spokeguard")
        outsider_meets_what_is_public()

    with subtest("after a boot the confirmed rules are there before the network"):
        spoke.shutdown()
        spoke.start()
        spoke.wait_for_unit("spokeguard-boot.service")
        hub_comes()
        outsider_meets_what_is_public()

    with subtest("without the daemon nothing opens"):
        spoke.succeed("systemctl stop spokeguard.service")
        outsider_meets_what_is_public()
        hub_comes()
  '';
}
