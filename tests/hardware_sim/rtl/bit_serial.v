// A bit-serial dot-product unit: LANES one-bit products and a popcount per cycle, shifted by the weight of the
// bit planes and accumulated; the planes of the sign bits count negative (two's complement). The test bench
// prints how many cycles the dot product of two random vectors of length K took and how far off the result is.

module dot_product_unit #(parameter LANES = 8) (
    input clk,
    input clear,
    input enable,
    input negative,
    input [5:0] shift,
    input [LANES-1:0] weight_plane,
    input [LANES-1:0] act_plane,
    output reg signed [47:0] total
);
    wire [LANES-1:0] products = weight_plane & act_plane;
    reg signed [47:0] count;
    integer i;
    always @* begin
        count = 0;
        for (i = 0; i < LANES; i = i + 1) count = count + products[i];
    end
    always @(posedge clk)
        if (clear) total <= 0;
        else if (enable) total <= negative ? total - (count <<< shift) : total + (count <<< shift);
endmodule

module bench;
    parameter LANES = 8, K = 20, WEIGHT_BITS = 3, ACT_BITS = 4;
    reg clk = 0, clear = 1, enable = 0, negative = 0;
    reg [5:0] shift = 0;
    reg [LANES-1:0] weight_plane = 0, act_plane = 0;
    wire signed [47:0] total;
    dot_product_unit #(LANES) dut (clk, clear, enable, negative, shift, weight_plane, act_plane, total);

    reg signed [WEIGHT_BITS-1:0] weight [0:K-1];
    reg signed [ACT_BITS-1:0] act [0:K-1];
    reg signed [47:0] expected;
    integer i, j, k, first;
    integer cycles = 0, seed = 1;

    initial begin
        expected = 0;
        for (k = 0; k < K; k = k + 1) begin
            weight[k] = $random(seed);
            act[k] = $random(seed);
            // A one-bit signed number is 0 or -1, in the unit and here.
            expected = expected + weight[k] * act[k];
        end
        #1 clk = 1;
        #1 clk = 0;
        clear = 0;
        enable = 1;
        for (first = 0; first < K; first = first + LANES)
            for (i = 0; i < WEIGHT_BITS; i = i + 1)
                for (j = 0; j < ACT_BITS; j = j + 1) begin
                    for (k = 0; k < LANES; k = k + 1) begin
                        weight_plane[k] = (first + k < K) ? weight[first + k][i] : 1'b0;
                        act_plane[k] = (first + k < K) ? act[first + k][j] : 1'b0;
                    end
                    shift = i + j;
                    negative = (i == WEIGHT_BITS - 1) != (j == ACT_BITS - 1);
                    #1 clk = 1;
                    #1 clk = 0;
                    cycles = cycles + 1;
                end
        $display("%0d %0d", cycles, total - expected);
        $finish;
    end
endmodule
